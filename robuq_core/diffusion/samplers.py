"""DDPM, DDIM and DPM-Solver++(2M) as tables: one step of each is a linear map with coefficients of its own.

    x_next = on_xt x_t + on_x0 x_0 + on_previous_x0 x_0' + std noise

where ``x_0`` is the network's estimate at this step and ``x_0'`` the one before. So rows at any timestep of any sampler
advance in one expression. Tables are built in float64 from ``alpha_bar`` at the visited timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from robuq_core.config import PredictionType, SamplerName
from robuq_core.diffusion.schedule import (
    alphas_cumprod,
    interior_timesteps,
    respaced_timesteps,
    to_sample_coefficients,
)


@dataclass(frozen=True)
class StepTable:
    """The steps of one sampler run, first to last (descending timesteps); every tensor is float64 ``[steps]``.

    ``timesteps``: the original indices 0..999 that the network sees. ``std``: of the noise added (0: none) where the
    network learns no variance. ``log_beta`` and ``log_posterior``: the bounds between which a learned variance
    interpolates (DDPM only).
    """

    timesteps: tuple[int, ...]
    alpha_bar: Tensor
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
        """Some step looks at the estimate before its own."""
        return bool(self.on_previous_x0.any())


class Coefficients(NamedTuple):
    """Columns of :func:`step_coefficients`: ``x_0 = x0_on_xt x_t + x0_on_output output``, the rest as in the table."""

    x0_on_xt: Tensor
    x0_on_output: Tensor
    on_xt: Tensor
    on_x0: Tensor
    on_previous_x0: Tensor
    std: Tensor
    log_beta: Tensor
    log_posterior: Tensor


@lru_cache(maxsize=256)
def step_coefficients(sampler: SamplerName, steps: int, prediction_type: PredictionType) -> tuple[Tensor, ...]:
    """One float32 ``[8]`` a step, in the order of :class:`Coefficients`: what a batch of rows stacks.

    Raises:
        ValueError: as :func:`step_table`.
    """
    table = step_table(sampler, steps)
    columns = Coefficients(
        *to_sample_coefficients(table.alpha_bar, prediction_type),
        table.on_xt,
        table.on_x0,
        table.on_previous_x0,
        table.std,
        table.log_beta,
        table.log_posterior,
    )
    return torch.stack(columns, dim=1).float().unbind()


@lru_cache(maxsize=256)
def step_table(sampler: SamplerName, steps: int) -> StepTable:
    """The table of ``sampler`` over ``steps`` steps (1..1000).

    Raises:
        ValueError: steps out of range or an unknown sampler.
    """
    timesteps = (interior_timesteps if sampler == "dpmsolver++" else respaced_timesteps)(steps)[::-1]
    alpha_bar = alphas_cumprod()[timesteps]
    # Past the last step the image is clean.
    following = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
    beta = 1 - alpha_bar / following
    posterior = beta * (1 - following) / (1 - alpha_bar)
    zeros = torch.zeros_like(alpha_bar)
    # The last posterior variance is 0; its logarithm is cut to the one before, as no noise is added there anyway.
    clipped = posterior.clone()
    clipped[-1] = posterior[-2] if steps > 1 else beta[-1]
    if sampler == "ddpm":
        on_x0 = beta * following.sqrt() / (1 - alpha_bar)
        on_xt = (1 - following) * (1 - beta).sqrt() / (1 - alpha_bar)
        # Without a learned variance, the larger of the two bounds, as in the official code.
        std = beta.sqrt()
        std[-1] = 0
        coefficients = (on_xt, on_x0, zeros, std)
    elif sampler == "ddim":
        on_xt = ((1 - following) / (1 - alpha_bar)).sqrt()
        coefficients = (on_xt, following.sqrt() - on_xt * alpha_bar.sqrt(), zeros, zeros)
    elif sampler == "dpmsolver++":
        coefficients = (*_dpm_solver_2m(alpha_bar, following), zeros)
    else:
        raise ValueError(f"sampler must be ddpm, ddim or dpmsolver++, not {sampler!r}")
    return StepTable(tuple(timesteps), alpha_bar, *coefficients, beta.log(), clipped.log(), sampler == "ddpm")


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
