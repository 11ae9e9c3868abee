import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.config import PredictionType
from robuq_core.diffusion.schedule import (
    alphas_cumprod,
    interior_timesteps,
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


def test_respacing_to_250_uses_a_fractional_stride() -> None:
    timesteps = respaced_timesteps(250)
    assert timesteps[:5] == [0, 4, 8, 12, 16]
    assert timesteps[1:] == [round(i * 999 / 249) for i in range(1, 250)]
    assert respaced_timesteps(1000) == list(range(1000))
    assert respaced_timesteps(1) == [999]


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


@given(st.sampled_from(["epsilon", "v_prediction", "sample"]), st.integers(0, 999))
def test_a_perfect_prediction_gives_the_sample_back(kind: PredictionType, timestep: int) -> None:
    generator = torch.Generator().manual_seed(timestep)
    x0, noise = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind(0)
    bar = alphas_cumprod()[timestep]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    a, b = to_sample_coefficients(bar, kind)
    torch.testing.assert_close(a * x_t + b * training_target(x0, noise, bar, kind), x0, atol=1e-9, rtol=1e-9)


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
