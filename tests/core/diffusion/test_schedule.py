import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.config import PredictionType
from robuq_core.diffusion.schedule import (
    alphas_cumprod,
    interior_timesteps,
    mixture,
    respaced_timesteps,
    to_sample_coefficients,
    training_target,
)


def test_linear_betas() -> None:
    bar = alphas_cumprod()
    assert bar.dtype == torch.float64
    assert float(bar[0]) == pytest.approx(1 - 1e-4)
    assert float(1 - bar[999] / bar[998]) == pytest.approx(0.02)


@given(st.integers(2, 1000))
def test_respacing_visits_distinct_original_indices(steps: int) -> None:
    timesteps = respaced_timesteps(steps)
    assert len(timesteps) == len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps)
    assert (timesteps[0], timesteps[-1]) == (0, 999)


def test_respacing_adds_its_stride_up_at_every_step_count() -> None:
    """As the official code does, written out; at 278 of the counts a product would round some index the other way."""
    others = []
    for steps in range(2, 1001):
        place, expected = 0.0, []
        for _ in range(steps):
            expected.append(round(place))
            place += 999 / (steps - 1)
        assert respaced_timesteps(steps) == expected
        if expected != [round(i * (999 / (steps - 1))) for i in range(steps)]:
            others.append(steps)
    assert len(others) == 278
    assert others[:4] == [21, 23, 31, 35]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        respaced_timesteps(steps)


@given(st.sampled_from(["epsilon", "v_prediction", "sample", "flow"]), st.integers(0, 999))
def test_a_perfect_prediction_gives_the_sample_back(kind: PredictionType, timestep: int) -> None:
    generator = torch.Generator().manual_seed(timestep)
    x0, noise = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind(0)
    signal, sigma = mixture(torch.tensor(timestep), kind)
    x_t = signal * x0 + sigma * noise
    a, b = to_sample_coefficients(signal, sigma, kind)
    target = training_target(x0, noise, signal, sigma, kind)
    torch.testing.assert_close(a * x_t + b * target, x0, atol=1e-9, rtol=1e-9)


def test_a_flow_is_a_straight_line_at_a_constant_velocity() -> None:
    x0, noise = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    times = torch.tensor([0.0, 250.0, 999.5, 1000.0])
    signal, sigma = mixture(times, "flow")
    assert torch.equal(sigma, times.double() / 1000)
    points = signal[:, None] * x0 + sigma[:, None] * noise
    assert torch.equal(points[0], x0)
    assert torch.equal(points[-1], noise)
    velocity = training_target(x0, noise, signal[:, None], sigma[:, None], "flow")
    torch.testing.assert_close((points[2] - points[1]) / 0.7495, velocity, atol=1e-12, rtol=1e-9)


@given(st.integers(1, 999))
def test_interior_timesteps_leave_zero_out(steps: int) -> None:
    timesteps = interior_timesteps(steps)
    assert len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps)
    assert timesteps[0] > 0
    assert timesteps[-1] == 999


def test_interior_timesteps_of_a_full_run_are_all() -> None:
    assert interior_timesteps(1000) == list(range(1000))
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        interior_timesteps(0)
