"""The three prediction types say the same thing, and the variational bound is a KL between Gaussians."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from robuq_core.config import DiffusionConfig, PredictionType
from robuq_core.diffusion.schedule import mixture, to_sample_coefficients, training_target
from train.data import step_generator
from train.loss import add_noise, diffusion_loss, draw_timesteps, variational_bound

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
ALL_TYPES: tuple[PredictionType, ...] = (*PREDICTION_TYPES, "flow")


def noisy_batch(
    timesteps: list[int], seed: int = 0, prediction_type: PredictionType = "epsilon"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x0, noise, x_t, t``, float64; x0 on the grid of 8-bit pixels."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor(timesteps)
    x0 = torch.randint(0, 256, (len(t), 3, 4, 4), generator=generator).double() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return x0, noise, add_noise(x0, noise, t, prediction_type), t


def posterior(x0: Tensor, x_t: Tensor, t: int) -> Normal:
    """q(x_{t-1} | x_t, x_0), written out from the betas (arXiv 2006.11239, eq. 6-7)."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = bar[t - 1]
    mean = before.sqrt() * beta[t] / (1 - bar[t]) * x0 + (1 - beta[t]).sqrt() * (1 - before) / (1 - bar[t]) * x_t
    return Normal(mean, (beta[t] * (1 - before) / (1 - bar[t])).sqrt())


@given(
    t=st.lists(st.integers(0, 999), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    prediction_type=st.sampled_from(ALL_TYPES),
)
def test_a_perfect_prediction_costs_nothing_and_recovers_the_image(
    t: list[int], seed: int, prediction_type: PredictionType
) -> None:
    x0, noise, x_t, timesteps = noisy_batch(t, seed, prediction_type)
    signal, sigma = (each[:, None, None, None] for each in mixture(timesteps, prediction_type))
    output = training_target(x0, noise, signal, sigma, prediction_type)
    assert diffusion_loss(output, x0, x_t, noise, timesteps, DiffusionConfig(prediction_type=prediction_type)) == 0
    a, b = to_sample_coefficients(signal, sigma, prediction_type)
    assert torch.allclose(a * x_t + b * output, x0, atol=1e-9)


@given(t=st.lists(st.integers(1, 999), min_size=1, max_size=5))
def test_the_bound_is_zero_at_the_true_posterior(t: list[int]) -> None:
    x0, _, x_t, timesteps = noisy_batch(t)
    # fraction 0 (output -1) is the posterior's own variance.
    assert float(variational_bound(x0, torch.full_like(x0, -1), x0, x_t, timesteps)) == pytest.approx(0, abs=1e-9)


@given(t=st.integers(1, 999), fraction=st.floats(0, 1), error=st.floats(-0.5, 0.5), seed=st.integers(0, 99))
def test_the_bound_is_the_kl_of_torch(t: int, fraction: float, error: float, seed: int) -> None:
    x0, _, x_t, timesteps = noisy_batch([t], seed)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[t]
    true = posterior(x0, x_t, t)
    predicted = posterior(x0 + error, x_t, t)
    std = torch.exp(0.5 * (fraction * beta.log() + (1 - fraction) * predicted.variance.log()))
    expected = kl_divergence(true, Normal(predicted.mean, std)).mean() / math.log(2)
    bound = variational_bound(x0 + error, torch.full_like(x0, 2 * fraction - 1), x0, x_t, timesteps)
    # The tables are float32: log variances near -10 carry 1e-6.
    assert float(bound) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@given(error=st.floats(-0.02, 0.02), fraction=st.floats(0, 1))
def test_the_first_timestep_is_the_likelihood_of_8_bit_pixels(error: float, fraction: float) -> None:
    x0, _, x_t, timesteps = noisy_batch([0])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    clipped = beta[1] * (1 - bar[0]) / (1 - bar[1])
    std = torch.exp(0.5 * (fraction * beta[0].log() + (1 - fraction) * clipped.log()))
    pixel = Normal(x0 + error, std)
    upper = torch.where(x0 > 0.999, torch.ones_like(x0), pixel.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, torch.zeros_like(x0), pixel.cdf(x0 - 1 / 255))
    expected = -(upper - lower).clamp(min=1e-12).log().mean() / math.log(2)
    bound = variational_bound(x0 + error, torch.full_like(x0, 2 * fraction - 1), x0, x_t, timesteps)
    assert float(bound) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_every_pixel_value_gets_its_share_of_the_likelihood() -> None:
    """The bins of the 256 values cover the line: their probabilities sum to 1."""
    values = (torch.arange(256).double() / 127.5 - 1)[:, None, None, None]
    timesteps = torch.zeros(256, dtype=torch.long)
    nats = []
    for i in range(256):
        one = values[i : i + 1]
        nats.append(variational_bound(torch.full_like(one, 0.1), torch.ones_like(one), one, one * 0, timesteps[:1]))
    assert float((-torch.stack(nats) * math.log(2)).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_bound_trains_the_variance_and_not_the_mean(prediction_type: PredictionType) -> None:
    x0, noise, x_t, timesteps = (
        each.float() if each.is_floating_point() else each for each in noisy_batch([0, 5, 900])
    )
    config = DiffusionConfig(prediction_type=prediction_type)
    output = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (gradient,) = torch.autograd.grad(diffusion_loss(output, x0, x_t, noise, timesteps, config), output)
    (mse_alone,) = torch.autograd.grad(diffusion_loss(output[:, :3], x0, x_t, noise, timesteps, config), output)
    assert torch.equal(gradient[:, :3], mse_alone[:, :3])
    assert gradient[:, 3:].abs().sum() > 0
    assert mse_alone[:, 3:].abs().sum() == 0


def test_timesteps_are_uniform_over_all_thousand() -> None:
    drawn = draw_timesteps(100_000, step_generator(0, 0), "epsilon")
    assert drawn.min() == 0
    assert drawn.max() == 999
    assert len(drawn.unique()) == 1000
    assert float(drawn.float().mean()) == pytest.approx(499.5, abs=5)


def test_no_two_seeds_share_a_stream() -> None:
    """torch's CPU generator takes 32 bits of a seed: seeds a high power of two apart must still differ."""

    def noise(seed: int, step: int = 7, stream: int = 0) -> list[float]:
        return torch.randn(4, generator=step_generator(seed, step, stream)).tolist()

    first = noise(3)
    assert first == noise(3)
    for other in (noise(3 + 2**28), noise(3 + 2**31), noise(4), noise(3, step=8), noise(3, stream=1)):
        assert other != first


def test_the_times_of_a_flow_are_uniform_and_continuous() -> None:
    drawn = draw_timesteps(100_000, step_generator(0, 0), "flow")
    assert 0 <= float(drawn.min()) < 1
    assert 999 < float(drawn.max()) < 1000
    assert len(drawn.unique()) > 90_000
    assert float(drawn.mean()) == pytest.approx(500, abs=5)


def test_a_flow_trains_no_variance() -> None:
    x0, noise, x_t, timesteps = noisy_batch([5, 500], prediction_type="flow")
    output = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    config = DiffusionConfig(prediction_type="flow")
    (gradient,) = torch.autograd.grad(diffusion_loss(output, x0, x_t, noise, timesteps, config), output)
    assert gradient[:, :3].abs().min() > 0
    assert gradient[:, 3:].abs().max() == 0
