"""Samplers against a distribution whose score is known: for data N(m, s^2) the posterior mean of x_0 is linear."""

from typing import get_args

import pytest
import torch

from robuq_core.config import DIFFUSION_SAMPLERS, FLOW_SAMPLERS, PredictionType, SamplerName, samplers_of
from robuq_core.diffusion.samplers import Coefficients, StepTable, step_coefficients, step_table
from robuq_core.diffusion.schedule import training_target

MEAN, STD = 0.4, 0.5


def _posterior_mean(x: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    gain = signal * STD**2 / (signal**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - signal * MEAN)


def _run(table: StepTable, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    previous = torch.zeros_like(x)
    for i in range(len(table)):
        x0 = _posterior_mean(x, table.signal[i], table.sigma[i])
        x = table.on_xt[i] * x + table.on_x0[i] * x0 + table.on_previous_x0[i] * previous
        x = x + table.std[i] * torch.randn(count, generator=generator, dtype=torch.float64)
        previous = x0
    return x


@pytest.mark.parametrize(("sampler", "steps"), [
    ("ddpm", 1000), ("ddim", 250), ("dpmsolver++", 25), ("euler", 250), ("heun", 49), ("sde", 250)
])  # fmt: skip
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
    assert error("heun") < 0.5 * error("euler")


@pytest.mark.parametrize("sampler", [*DIFFUSION_SAMPLERS, *FLOW_SAMPLERS])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999, 1000])
def test_tables_end_on_a_clean_image(sampler: SamplerName, steps: int) -> None:
    table = step_table(sampler, steps)
    assert len(table) == len(table.timesteps) == steps
    assert list(table.timesteps) == sorted(table.timesteps, reverse=True)
    for column in (table.on_xt, table.on_x0, table.on_previous_x0, table.std, table.log_beta, table.log_posterior):
        assert column.shape == (steps,)
        assert bool(column.isfinite().all())
    if sampler == "sde" and steps > 1:  # its last step, the mean of the SDE's, leaves as much noise as it began with
        assert float(table.on_xt[-1]) == pytest.approx(-1)
        assert float(table.on_xt[-1] * table.signal[-1] + table.on_x0[-1]) == pytest.approx(1)
        assert float(table.sigma[-1]) == pytest.approx(0.04)
    else:
        assert float(table.on_xt[-1]) == 0
        assert float(table.on_x0[-1] + table.on_previous_x0[-1]) == pytest.approx(1)
    assert float(table.std[-1]) == 0


def test_ddpm_is_the_posterior_of_the_respaced_chain() -> None:
    table = step_table("ddpm", 1000)
    alpha_bar = table.signal.square()
    bar, following = alpha_bar[:-1], alpha_bar[1:]
    beta = 1 - bar / following
    torch.testing.assert_close(table.std[:-1].square(), beta)
    torch.testing.assert_close(table.log_beta[:-1], beta.log())
    torch.testing.assert_close(table.log_posterior[:-1], (beta * (1 - following) / (1 - bar)).log())
    # A noiseless x_t = sqrt(abar) x_0 stays on the noiseless path.
    torch.testing.assert_close(table.on_xt[:-1] * bar.sqrt() + table.on_x0[:-1], following.sqrt())


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [(sampler, prediction) for prediction in get_args(PredictionType) for sampler in samplers_of(prediction)],
)
def test_coefficients_are_the_table_in_float32(sampler: SamplerName, prediction: PredictionType) -> None:
    table, rows = step_table(sampler, 7), step_coefficients(sampler, 7, prediction)
    assert len(rows) == 7
    columns = dict(zip(Coefficients._fields, torch.tensor(rows).unbind(1), strict=True))
    for name in ("on_xt", "on_x0", "on_previous_x0", "std", "log_beta", "log_posterior"):
        assert torch.equal(columns[name], getattr(table, name).float())
    # An exact prediction gives back the clean image.
    x0, noise = torch.tensor(0.3), torch.tensor(-1.2)
    signal, sigma = table.signal.float(), table.sigma.float()
    output = training_target(x0, noise, signal, sigma, prediction)
    estimate = columns["x0_on_xt"] * (signal * x0 + sigma * noise) + columns["x0_on_output"] * output
    assert torch.allclose(estimate, x0.expand(7), atol=1e-3)


def test_only_the_second_order_solvers_look_back() -> None:
    samplers = (*DIFFUSION_SAMPLERS, *FLOW_SAMPLERS)
    assert [name for name in samplers if step_table(name, 5).multistep] == ["dpmsolver++", "heun"]


def _velocity(x: torch.Tensor, s: float) -> torch.Tensor:
    """That of the network's convention, from image to noise: any smooth function will do."""
    return torch.sin(3 * x) + s * x


def _by_table(sampler: SamplerName, steps: int, x: torch.Tensor, noises: torch.Tensor | None = None) -> torch.Tensor:
    table, previous = step_table(sampler, steps), torch.zeros_like(x)
    for i, s in enumerate(table.sigma.tolist()):
        x0 = x - s * _velocity(x, s)
        x = table.on_xt[i] * x + table.on_x0[i] * x0 + table.on_previous_x0[i] * previous
        if noises is not None:
            x = x + table.std[i] * noises[i]
        previous = x0
    return x


def _start() -> torch.Tensor:
    return torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_euler_is_eulers_method() -> None:
    x = start = _start()
    for i in range(10):
        x = x - 0.1 * _velocity(x, 1 - i / 10)
    torch.testing.assert_close(_by_table("euler", 10, start), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "intervals", "corrected"), [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1), (19, 10, 9)])
def test_heun_is_heuns_method_at_one_forward_a_step(steps: int, intervals: int, corrected: int) -> None:
    x = start = _start()
    h = 1 / intervals
    for i in range(intervals):
        first = _velocity(x, 1 - i * h)
        second = _velocity(x - h * first, 1 - (i + 1) * h)
        x = x - h * (first + second) / 2 if i < corrected else x - h * first
    torch.testing.assert_close(_by_table("heun", steps, start), x, rtol=0, atol=1e-11)


def test_the_sde_is_euler_maruyamas_method_with_a_last_step_of_the_mean() -> None:
    steps, x = 12, _start()
    start = x
    noises = torch.randn(steps, len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    times = [1 - 0.96 * i / (steps - 1) for i in range(steps)] + [0.0]
    for i in range(steps):
        s, h = times[i], times[i] - times[i + 1]
        velocity = _velocity(x, s)
        noise = x + (1 - s) * velocity  # of x = (1 - s) x_0 + s noise and velocity = noise - x_0
        x = x - h * (velocity - s * (-noise / s))
        if i < steps - 1:
            x = x + (2 * s * h) ** 0.5 * noises[i]
    torch.testing.assert_close(_by_table("sde", steps, start, noises), x, rtol=0, atol=1e-11)
