"""Per-token activation quantisers, 1 to 8 bits: the Gaussian-step uniform one, eq. (4), and two to compare it with.

After the rotation every token is close to normal, so one step per bit width, optimal for N(0, 1), serves every layer
and timestep without calibration or learned clipping. The others exist only in training: Lloyd-Max levels for the same
normal (more accurate, but without an integer product), and each token's minimum and maximum.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from robuq_core.quant.choices import ActivationRule, Grid

MIN_BITS, MAX_BITS = 1, 8

# Optimal step of the mid-rise uniform quantiser of N(0, 1), by bits.
GAUSSIAN_STEP = {
    1: 1.595769,
    2: 0.995687,
    3: 0.586019,
    4: 0.335201,
    5: 0.188139,
    6: 0.104063,
    7: 0.056868,
    8: 0.030762,
}

_NEWTON_STEPS = 30
# A token of zeros has scale 0; the clamp keeps its codes finite.
_SMALLEST_SCALE = 1e-30
# sigma of a normal over its mean absolute value.
SIGMA_PER_MEAN_ABS = math.sqrt(math.pi / 2)


def is_midrise(bits: int, grid: Grid) -> bool:
    """Whether codes are odd half-steps (mid-rise): always with one bit; never with eight, where they exceed int8."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"activation bits must be {MIN_BITS}..{MAX_BITS}, not {bits}")
    return bits == 1 or (grid == "midrise" and bits < MAX_BITS)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, whose gradient with respect to ``x`` (same shape and dtype) is the identity."""
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return, no-untyped-call]


def quantize_activation(x: Tensor, bits: int, grid: Grid = "midrise") -> tuple[Tensor, Tensor]:
    """Integer codes and per-token scales, eq. (4): ``x ~ scale * codes``.

    ``sigma = sqrt(pi/2) mean|x|`` over the last dimension. Mid-rise: odd codes in ``-(2^b - 1)..2^b - 1`` and
    ``scale = step_b sigma / 2``. Mid-tread: codes in ``-2^(b-1)..2^(b-1) - 1`` and ``scale = step_b sigma``.

    Args:
        x: rotated activations ``[..., K]``, floating point.
        bits: 1..8. ``grid``: see :func:`is_midrise`.

    Returns:
        codes int8 ``[..., K]``; scales float32 ``[..., 1]``.
    """
    codes, scales = _codes_and_scales(x.float(), bits, grid)
    return codes.to(torch.int8), scales


def _codes_and_scales(x: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    midrise = is_midrise(bits, grid)
    step = x.abs().mean(dim=-1, keepdim=True).mul_(SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits])
    # In place: training on a CPU is bound by such passes over memory.
    codes = x * (1.0 / step.clamp(min=_SMALLEST_SCALE))
    if midrise:
        top = 2**bits - 1
        return codes.floor_().mul_(2).add_(1).clamp_(-top, top), step * 0.5
    half = 2 ** (bits - 1)
    return codes.round_().clamp_(-half, half - 1), step


def fake_quantize_activation(x: Tensor, bits: int, grid: Grid = "midrise", rule: ActivationRule = "gaussian") -> Tensor:
    """The quantised value of ``x`` ``[..., K]``, same dtype; its gradient is the identity (also where clipped).

    ``gaussian``: ``scale * codes`` of :func:`quantize_activation`, on ``grid``. ``lloyd_max``: the nearest of
    :func:`lloyd_max_levels` times the token's sigma. ``minmax``: ``2^bits`` even levels from minimum to maximum.
    """
    detached = x.detach().float()
    if rule == "gaussian":
        codes, scales = _codes_and_scales(detached, bits, grid)
        value = codes.mul_(scales)
    elif rule == "lloyd_max":
        value = _nearest_level(detached, bits)
    else:
        value = _between_extremes(detached, bits)
    return straight_through(x, value.to(x.dtype))


def _nearest_level(x: Tensor, bits: int) -> Tensor:
    levels = torch.tensor(lloyd_max_levels(bits), dtype=torch.float32, device=x.device)
    sigma = x.abs().mean(dim=-1, keepdim=True).mul_(SIGMA_PER_MEAN_ABS)
    index = torch.bucketize(x / sigma.clamp(min=_SMALLEST_SCALE), (levels[1:] + levels[:-1]) / 2)
    return levels[index].mul_(sigma)


def _between_extremes(x: Tensor, bits: int) -> Tensor:
    is_midrise(bits, "midrise")  # checks the width
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (x - low).div_(step.clamp(min=_SMALLEST_SCALE)).round_().mul_(step).add_(low)


def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The ``2^bits`` levels with the least mean squared error on N(0, 1), ascending (Lloyd 1957, Max 1960).

    Each level is the mean of its cell, whose borders are half-way to its neighbours. Solved by Newton's method in
    float64 on the positive half, starting from the limit density ``p^(1/3)``.
    """
    return _solved_levels(bits)


# Keeps torch.compile from tracing it. torch.compiler.assume_constant_result sets the same mark, but imports
# torch._dynamo, which takes seconds at every start of a server.
lloyd_max_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=8)
def _solved_levels(bits: int) -> tuple[float, ...]:
    is_midrise(bits, "midrise")  # checks the width
    half = 2 ** (bits - 1)
    quantiles = (torch.arange(half, dtype=torch.float64) + half + 0.5) / (2 * half)
    levels = math.sqrt(3) * torch.special.ndtri(quantiles)
    for _ in range(_NEWTON_STEPS):
        slope = torch.func.jacfwd(_off_centre)(levels)
        levels = levels - torch.linalg.solve(slope, _off_centre(levels))
    return tuple((-levels.flip(0)).tolist() + levels.tolist())


def _off_centre(levels: Tensor) -> Tensor:
    """Positive ``levels`` minus the means of their cells in N(0, 1)."""
    borders = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2])
    density = torch.cat([torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi), levels.new_zeros(1)])
    beyond = torch.cat([torch.special.ndtr(-borders), levels.new_zeros(1)])
    return levels - (density[:-1] - density[1:]) / (beyond[:-1] - beyond[1:])
