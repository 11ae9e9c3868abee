"""Schedule tables of the two processes, float64, and the timestep subsets that samplers visit (1 to 1,000)."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, repeat

import torch
from torch import Tensor

from robuq_core.config import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, PredictionType


@lru_cache(maxsize=1)
def alphas_cumprod() -> Tensor:
    """``alpha_bar_t`` for t = 0..999, float64 ``[1000]``: linear betas from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64), 0)


def respaced_timesteps(steps: int) -> list[int]:
    """``steps`` original indices, ascending, including 0 and 999: a fractional stride, rounded (IDDPM's spacing).

    As in the official code the stride is summed in floating point, which decides ties: ``round(i * stride)`` differs
    for 278 of the step counts. A single step starts from noise, at 999; the official code would use t = 0.
    """
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"steps must be 1..{NUM_TRAIN_TIMESTEPS}, not {steps}")
    if steps == 1:
        return [NUM_TRAIN_TIMESTEPS - 1]
    stride = (NUM_TRAIN_TIMESTEPS - 1) / (steps - 1)
    return [round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0)]


def interior_timesteps(steps: int) -> list[int]:
    """``steps`` original indices, ascending: ``linspace(0, 999, steps + 1)`` rounded, without its 0.

    For solvers in log-SNR, which is unbounded towards 0: a step onto t = 0 would dwarf the one before it. All 1,000
    steps include 0.
    """
    if not 1 <= steps < NUM_TRAIN_TIMESTEPS:
        return respaced_timesteps(steps)
    return [round(i * (NUM_TRAIN_TIMESTEPS - 1) / steps) for i in range(1, steps + 1)]


def mixture(timesteps: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """``(signal, sigma)`` of ``x_t = signal x_0 + sigma noise``, float64 in the shape of ``timesteps``.

    flow: ``1 - s`` and ``s`` for timesteps ``1000 s``, of any type; the others: ``sqrt(abar_t)`` and
    ``sqrt(1 - abar_t)`` for indices 0..999.
    """
    if prediction_type == "flow":
        sigma = timesteps.double() / NUM_TRAIN_TIMESTEPS
        return 1 - sigma, sigma
    alpha_bar = alphas_cumprod().to(timesteps.device)[timesteps]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def to_sample_coefficients(signal: Tensor, sigma: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """``(a, b)`` such that ``x_0 = a x_t + b output`` for a network that predicts ``prediction_type``.

    With ``x_t = signal x_0 + sigma noise``. epsilon: ``x_0 = (x_t - sigma eps) / signal``; v:
    ``x_0 = signal x_t - sigma v``; flow: ``x_0 = x_t - sigma v``; sample: the output itself.
    """
    if prediction_type == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction_type == "v_prediction":
        return signal, -sigma
    if prediction_type == "flow":
        return torch.ones_like(signal), -sigma
    return torch.zeros_like(signal), torch.ones_like(signal)


def training_target(
    x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the network should output for ``x_t = signal x_0 + sigma noise``; ``signal`` and ``sigma`` broadcast.

    flow: ``dx_t / ds = noise - x_0``, from the image to the noise.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return signal * noise - sigma * x0
    if prediction_type == "flow":
        return noise - x0
    return x0
