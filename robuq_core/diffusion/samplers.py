"""DDPM, DDIM, DPM-Solver++(2M) and the flow samplers as tables: a step is a linear map with its own coefficients.

    x_next = on_xt x_t + on_x0 x_0 + on_previous_x0 x_0' + std noise

where ``x_0`` is the network's estimate at this step and ``x_0'`` the one before. Rows at any timestep of any sampler
thus advance in one expression. Tables are built in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from robuq_core.config import FLOW_SAMPLERS, NUM_TRAIN_TIMESTEPS, PredictionType, SamplerName
from robuq_core.diffusion.schedule import (
    alphas_cumprod,
    interior_timesteps,
    respaced_timesteps,
    to_sample_coefficients,
)

# Start of the last step of a flow's SDE, without noise: towards s = 0 its score is unbounded.
_LAST_SDE_STEP = 0.04


@dataclass(frozen=True)
class StepTable:
    """The steps of one sampler run, first to last, timesteps not increasing; every tensor is float64 ``[steps]``.

    ``timesteps``: input of the network, original indices 0..999 or, of a flow, 1000 s. ``signal``, ``sigma``:
    ``x_t = signal x_0 + sigma noise`` there. ``std``: of the added noise (0: none) if the network learns no variance.
    ``log_beta``, ``log_posterior``: the bounds between which a learned variance interpolates (DDPM only).
    """

    timesteps: tuple[float, ...]
    signal: Tensor
    sigma: Tensor
    on_xt: Tensor
    on_x0: Tensor
    on_previous_x0: Tensor
    std: Tensor
    log_beta: Tensor
    log_posterior: Tensor
    stochastic: bool

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def multistep(self) -> bool:
        """Whether a step uses the previous estimate."""
        return bool(self.on_previous_x0.any())


class Coefficients(NamedTuple):
    """Of one step, float32: ``x_0 = x0_on_xt x_t + x0_on_output output``, the rest as in :class:`StepTable`."""

    x0_on_xt: float
    x0_on_output: float
    on_xt: float
    on_x0: float
    on_previous_x0: float
    std: float
    log_beta: float
    log_posterior: float


@lru_cache(maxsize=256)
def step_coefficients(sampler: SamplerName, steps: int, prediction_type: PredictionType) -> tuple[Coefficients, ...]:
    """The table's coefficients step by step, for a network that predicts ``prediction_type``."""
    table = step_table(sampler, steps)
    columns = (*to_sample_coefficients(table.signal, table.sigma, prediction_type), table.on_xt, table.on_x0,
               table.on_previous_x0, table.std, table.log_beta, table.log_posterior)  # fmt: skip
    return tuple(Coefficients(*row) for row in torch.stack(columns, dim=1).float().tolist())


@lru_cache(maxsize=256)
def step_table(sampler: SamplerName, steps: int) -> StepTable:
    """The table of ``sampler`` over ``steps`` steps (1..1000)."""
    if sampler in FLOW_SAMPLERS:
        return _flow_table(sampler, steps)
    timesteps = (interior_timesteps if sampler == "dpmsolver++" else respaced_timesteps)(steps)[::-1]
    alpha_bar = alphas_cumprod()[timesteps]
    # After the last step the image is clean.
    following = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    beta = 1 - alpha_bar / following
    posterior = beta * (1 - following) / (1 - alpha_bar)
    zeros = torch.zeros_like(alpha_bar)
    # The last posterior variance is 0; its logarithm is that of the one before, as no noise is added there anyway.
    clipped = posterior.clone()
    clipped[-1] = posterior[-2] if steps > 1 else beta[-1]
    if sampler == "ddpm":
        on_x0 = beta * following.sqrt() / (1 - alpha_bar)
        on_xt = (1 - following) * (1 - beta).sqrt() / (1 - alpha_bar)
        # The larger of the two bounds, as in the official code.
        std = beta.sqrt()
        std[-1] = 0
        coefficients = (on_xt, on_x0, zeros, std)
    elif sampler == "ddim":
        on_xt = ((1 - following) / (1 - alpha_bar)).sqrt()
        coefficients = (on_xt, following.sqrt() - on_xt * alpha_bar.sqrt(), zeros, zeros)
    elif sampler == "dpmsolver++":
        coefficients = (*_dpm_solver_2m(alpha_bar, following), zeros)
    else:
        raise ValueError(f"sampler must be ddpm, ddim, dpmsolver++, euler, heun or sde, not {sampler!r}")
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return StepTable(tuple(timesteps), signal, sigma, *coefficients, beta.log(), clipped.log(), sampler == "ddpm")


def _dpm_solver_2m(alpha_bar: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DPM-Solver++(2M) in data prediction (arXiv 2211.01095, algorithm 2), ``lambda = log(alpha / sigma)``.

    The first step and the last (onto a clean image, where lambda is infinite) are first order, which is DDIM.
    """
    steps = len(alpha_bar)
    half_log_snr = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    on_xt = ((1 - following) / (1 - alpha_bar)).sqrt()
    data = following.sqrt() - on_xt * alpha_bar.sqrt()
    previous = torch.zeros_like(data)
    for i in range(1, steps - 1):
        h_before = half_log_snr[i] - half_log_snr[i - 1]
        h = half_log_snr[i + 1] - half_log_snr[i]
        extrapolation = h / (2 * h_before)
        previous[i] = -extrapolation * data[i]
        data[i] = (1 + extrapolation) * data[i]
    return on_xt, data, previous


def _flow_table(sampler: SamplerName, steps: int) -> StepTable:
    """Samplers of ``dx/ds = v`` from s = 1 to 0, with ``v = (x - x_0) / s``."""
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"steps must be 1..{NUM_TRAIN_TIMESTEPS}, not {steps}")
    stochastic = sampler == "sde" and steps > 1
    if sampler == "heun":
        sigma, coefficients = _heun(steps)
    elif stochastic:
        sigma, coefficients = _euler_maruyama(steps)
    else:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigma, zeros = times[:-1], torch.zeros(steps, dtype=torch.float64)
        coefficients = (*_euler(sigma, times[1:]), zeros, zeros)
    timesteps = tuple((NUM_TRAIN_TIMESTEPS * sigma).tolist())
    none = torch.zeros_like(sigma)
    return StepTable(timesteps, 1 - sigma, sigma, *coefficients, none, none, stochastic)


def _euler(sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """``x + (s' - s) v``: factors of x and x_0."""
    on_xt = following / sigma
    return on_xt, 1 - on_xt


def _heun(steps: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Heun's method with one forward per step: a prediction, then a correction at its end.

    The prediction is on the line from x to x_0', so ``v' = (x - x_0') / s`` there is still the velocity that made it,
    and ``x + (s_end - s_start) (v - v') / 2`` takes the mean of both. The last interval, which ends at s = 0, has no
    correction, nor the one before if ``steps`` is even.
    """
    intervals, corrected = steps // 2 + 1, (steps - 1) // 2
    times = torch.linspace(1, 0, intervals + 1, dtype=torch.float64)
    predicted = torch.stack([times[:-1], *_euler(times[:-1], times[1:]), torch.zeros_like(times[1:])], dim=1)
    ends = times[1 : corrected + 1]
    half = (times[:corrected] - ends) / (2 * ends)
    mended = torch.stack([ends, torch.ones_like(ends), half, -half], dim=1)
    pairs = torch.stack([predicted[:corrected], mended], dim=1).flatten(0, 1)
    sigma, *coefficients = torch.cat([pairs, predicted[corrected:]]).unbind(1)
    return sigma, (coefficients[0], coefficients[1], coefficients[2], torch.zeros_like(sigma))


def _euler_maruyama(steps: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``dx = (v - s score) ds + sqrt(2 s) dw`` (arXiv 2401.08740, eq. 5 with w = 2 s), backwards from s = 1.

    ``score = -noise / s`` and the noise is ``(x - (1 - s) x_0) / s``. The last step is the mean alone.
    """
    sigma = torch.linspace(1, _LAST_SDE_STEP, steps, dtype=torch.float64)
    step = torch.cat([sigma[1:], sigma.new_zeros(1)]) - sigma
    std = (2 * sigma * -step).sqrt()
    std[-1] = 0
    return sigma, (1 + 2 * step / sigma, -step * (2 - sigma) / sigma, torch.zeros_like(sigma), std)
