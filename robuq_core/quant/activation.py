"""Per-token Gaussian-step uniform activation quantiser, eq. (4), 1 to 8 bits.

After the rotation every token is close to normal, so one step per bit width, optimal for N(0, 1), serves
every layer and timestep: no calibration, no learned clip.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Grid = Literal["midrise", "midtread"]

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

# sigma of a normal from its mean absolute value.
SIGMA_PER_MEAN_ABS = math.sqrt(math.pi / 2)


def is_midrise(bits: int, grid: Grid) -> bool:
    """Whether codes are odd half-steps (mid-rise). One bit always is; eight bits never: odd codes would leave int8."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"activation bits must be {MIN_BITS}..{MAX_BITS}, not {bits}")
    return bits == 1 or (grid == "midrise" and bits < MAX_BITS)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Exactly ``value``, with the identity as its gradient with respect to ``x`` (``x - x`` is an exact zero)."""
    return value.detach() + (x - x.detach())


def quantize_activation(x: Tensor, bits: int, grid: Grid = "midrise") -> tuple[Tensor, Tensor]:
    """Integer codes and per-token scales, eq. (4): ``x ~ scale * codes``.

    ``sigma = sqrt(pi/2) mean|x|`` over the last dimension. Mid-rise: odd codes in ``-(2^b - 1)..2^b - 1`` and
    ``scale = step_b sigma / 2``. Mid-tread: codes in ``-2^(b-1)..2^(b-1) - 1`` and ``scale = step_b sigma``.

    Args:
        x: rotated activations ``[..., K]``, floating point.
        bits: 1..8. ``grid``: see :func:`is_midrise`.

    Returns:
        codes int8 ``[..., K]``; scales float32 ``[..., 1]``.

    Raises:
        ValueError: bits outside 1..8.
    """
    codes, scales = _codes_and_scales(x.float(), bits, grid)
    return codes.to(torch.int8), scales


def _codes_and_scales(x: Tensor, bits: int, grid: Grid) -> tuple[Tensor, Tensor]:
    midrise = is_midrise(bits, grid)
    step = x.abs().mean(dim=-1, keepdim=True) * (SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits])
    # A token of zeros has scale 0; the clamp only keeps its codes finite.
    inverse = 1.0 / step.clamp(min=1e-30)
    if midrise:
        top = 2**bits - 1
        codes = (torch.floor(x * inverse) * 2 + 1).clamp(-top, top)
        return codes, step * 0.5
    half = 2 ** (bits - 1)
    return torch.round(x * inverse).clamp(-half, half - 1), step


def fake_quantize_activation(x: Tensor, bits: int, grid: Grid = "midrise") -> Tensor:
    """``scale * codes`` of ``x`` ``[..., K]``, same dtype, with the identity as its gradient (also where clipped)."""
    codes, scales = _codes_and_scales(x.detach().float(), bits, grid)
    return straight_through(x, (codes * scales).to(x.dtype))
