"""Samplers against a distribution whose score is known: for data N(m, s^2) the posterior mean of x_0 is linear."""

import pytest
import torch

from robuq_core.config import SAMPLERS, PredictionType, SamplerName
from robuq_core.diffusion.samplers import Coefficients, StepTable, step_coefficients, step_table
from robuq_core.diffusion.schedule import training_target

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
    torch.testing.assert_close(table.std[:-1].square(), beta)
    torch.testing.assert_close(table.log_beta[:-1], beta.log())
    torch.testing.assert_close(table.log_posterior[:-1], (beta * (1 - following) / (1 - bar)).log())
    # A noiseless x_t = sqrt(abar) x_0 stays on the noiseless path.
    torch.testing.assert_close(table.on_xt[:-1] * bar.sqrt() + table.on_x0[:-1], following.sqrt())


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="sampler must be"):
        step_table("euler", 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_coefficients_are_the_table_in_float32(sampler: SamplerName, prediction: PredictionType) -> None:
    table, rows = step_table(sampler, 7), step_coefficients(sampler, 7, prediction)
    assert len(rows) == 7
    columns = Coefficients(*torch.stack(rows).unbind(1))
    for name in ("on_xt", "on_x0", "on_previous_x0", "std", "log_beta", "log_posterior"):
        assert torch.equal(getattr(columns, name), getattr(table, name).float())
    # An exact prediction gives back the clean image.
    x0, noise = torch.tensor(0.3), torch.tensor(-1.2)
    signal, sigma = table.alpha_bar.sqrt().float(), (1 - table.alpha_bar).sqrt().float()
    output = training_target(x0, noise, table.alpha_bar.float(), prediction)
    estimate = columns.x0_on_xt * (signal * x0 + sigma * noise) + columns.x0_on_output * output
    assert torch.allclose(estimate, x0.expand(7), atol=1e-3)


def test_only_the_second_order_solver_looks_back() -> None:
    assert {name: step_table(name, 5).multistep for name in SAMPLERS} == {
        "ddpm": False,
        "ddim": False,
        "dpmsolver++": True,
    }
