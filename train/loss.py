"""Training losses of a diffusion transformer: MSE of the prediction, plus the variational bound of a learned variance.

The bound sees a detached mean (LEARNED_RANGE of arXiv 2102.09672), so it trains the variance alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robuq_core.config import NUM_TRAIN_TIMESTEPS, DiffusionConfig, PredictionType
from robuq_core.diffusion.schedule import alphas_cumprod, mixture, to_sample_coefficients, training_target


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: PredictionType) -> Tensor:
    """``x_t`` of ``[B, C, H, W]`` images and ``[B]`` timesteps: see :func:`robuq_core.diffusion.schedule.mixture`."""
    signal, sigma = _mixture(timesteps, x0, prediction_type)
    return signal * x0 + sigma * noise


def _mixture(timesteps: Tensor, like: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    signal, sigma = mixture(timesteps.to(like.device), prediction_type)
    return signal.to(like.dtype)[:, None, None, None], sigma.to(like.dtype)[:, None, None, None]


def draw_timesteps(count: int, generator: torch.Generator, prediction_type: PredictionType) -> Tensor:
    """Uniform timesteps ``[count]``: int64 0..999 or, of a flow, float32 from 0 to below 1000."""
    if prediction_type == "flow":
        return NUM_TRAIN_TIMESTEPS * torch.rand(count, generator=generator)
    return torch.randint(0, NUM_TRAIN_TIMESTEPS, (count,), generator=generator)


def own_sample(x_t: Tensor, output: Tensor, start: Tensor, timesteps: Tensor, config: DiffusionConfig) -> Tensor:
    """Where DDIM takes ``x_t`` of timesteps ``start [B]`` to: ``[B, C, H, W]`` at ``timesteps [B]``, in one step.

    ``output``: the network's of ``x_t``, whose estimate of the image is clipped as it is when sampling.
    """
    signal, sigma = _mixture(start, x_t, config.prediction_type)
    a, b = to_sample_coefficients(signal, sigma, config.prediction_type)
    x0 = a * x_t + b * output[:, : x_t.shape[1]]
    if config.clip_sample:
        x0 = x0.clamp(-1, 1)
    return add_noise(x0, (x_t - signal * x0) / sigma, timesteps, config.prediction_type)


def diffusion_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, timesteps: Tensor, config: DiffusionConfig
) -> Tensor:
    """Mean loss of a batch: MSE of the prediction, plus the bound if the output has variance channels.

    A flow has no such bound; the spare channels of SiT's weights stay untrained, as there.
    """
    channels = x0.shape[1]
    prediction = output[:, :channels]
    signal, sigma = _mixture(timesteps, x0, config.prediction_type)
    loss = (prediction - training_target(x0, noise, signal, sigma, config.prediction_type)).square().mean()
    if output.shape[1] == channels or config.prediction_type == "flow":
        return loss
    a, b = to_sample_coefficients(signal, sigma, config.prediction_type)
    predicted_x0 = a * x_t + b * prediction.detach()
    return loss + variational_bound(predicted_x0, output[:, channels:], x0, x_t, timesteps)


def variational_bound(predicted_x0: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """The bound's term at each timestep, bits per dimension, averaged over the batch.

    ``log var = f log beta_t + (1 - f) log beta~_t`` with ``f = (v + 1) / 2``; KL between Gaussians for t > 0, the
    likelihood of 8-bit pixels at t = 0.
    """
    bar = alphas_cumprod()
    previous = torch.cat([bar.new_ones(1), bar[:-1]])
    beta = 1 - bar / previous
    posterior = beta * (1 - previous) / (1 - bar)
    posterior[0] = posterior[1]

    def rows(table: Tensor) -> Tensor:
        return table.to(x0.device)[timesteps].float()[:, None, None, None]

    on_x0, on_xt = rows(beta * previous.sqrt() / (1 - bar)), rows((1 - previous) * (1 - beta).sqrt() / (1 - bar))
    fraction = (variance + 1) / 2
    log_variance = fraction * rows(beta.log()) + (1 - fraction) * rows(posterior.log())
    true_log_variance = rows(posterior.log())
    true_mean, mean = on_x0 * x0 + on_xt * x_t, on_x0 * predicted_x0 + on_xt * x_t
    kl = 0.5 * (
        log_variance - true_log_variance - 1
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )  # fmt: skip
    bound = torch.where((timesteps == 0)[:, None, None, None], -_pixel_log_likelihood(x0, mean, log_variance), kl)
    return bound.mean() / math.log(2)


def _pixel_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of 8-bit pixels in [-1, 1] under a discretised Gaussian; the end bins reach to infinity."""
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((x0 - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) * inverse_std)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
