"""Samplers against a distribution whose score is known: for data N(m, s^2) the posterior mean of x_0 is linear."""

import pytest
import torch

from robuq_core.config import SAMPLERS, SamplerName
from robuq_core.diffusion.samplers import StepTable, step_table

MEAN, STD = 0.4, 0.5


def _posterior_mean(x: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + gain * (x - alpha_bar.sqrt() * MEAN)


def _run(table: StepTable, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    previous = torch.zeros_like(x)
    for i in range(len(table)):
        x0 = _posterior_mean(x, table.alpha_bar[i])
        x = table.on_xt[i] * x + table.on_x0[i] * x0 + table.on_previous_x0[i] * previous
        x = x + table.std[i] * torch.randn(count, generator=generator, dtype=torch.float64)
        previous = x0
    return x


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddim", 250), ("dpmsolver++", 25)])
def test_gaussian_data_is_sampled_with_its_mean_and_variance(sampler: SamplerName, steps: int) -> None:
    samples = _run(step_table(sampler, steps), 20_000, seed=steps)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(samples.std()) == pytest.approx(STD, rel=0.03)


def test_second_order_needs_fewer_steps() -> None:
    """Distance of a 25-step run from a fine one: both follow the same probability flow."""

    def error(sampler: SamplerName) -> float:
        fine, coarse = (_run(step_table(sampler, steps), 2000, seed=0) for steps in (1000, 25))
        return float((fine - coarse).abs().mean())

    assert error("dpmsolver++") < 0.5 * error("ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999, 1000])
def test_tables_end_on_a_clean_image(sampler: SamplerName, steps: int) -> None:
    table = step_table(sampler, steps)
    assert len(table) == len(table.timesteps) == steps
    assert list(table.timesteps) == sorted(table.timesteps, reverse=True)
    for column in (table.on_xt, table.on_x0, table.on_previous_x0, table.std, table.log_beta, table.log_posterior):
        assert column.shape == (steps,)
        assert bool(column.isfinite().all())
    assert float(table.on_xt[-1]) == 0
    assert float(table.on_x0[-1] + table.on_previous_x0[-1]) == pytest.approx(1)
    assert float(table.std[-1]) == 0


def test_ddpm_is_the_posterior_of_the_respaced_chain() -> None:
    table = step_table("ddpm", 1000)
    bar, following = table.alpha_bar[:-1], table.alpha_bar[1:]
    beta = 1 - bar / following
    torch.testing.assert_close(table.std[:-1].square(), beta * (1 - following) / (1 - bar))
    torch.testing.assert_close(table.log_beta[:-1], beta.log())
    # A noiseless x_t = sqrt(abar) x_0 stays on the noiseless path.
    torch.testing.assert_close(table.on_xt[:-1] * bar.sqrt() + table.on_x0[:-1], following.sqrt())


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="sampler must be"):
        step_table("euler", 10)  # type: ignore[arg-type]
