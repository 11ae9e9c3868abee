"""The table of positions in foreign weights: which scale it has, and that it is DiT's and not a learned one."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import sincos_positions

_TOLERANCE = 1e-4
# In steps of the stored type: rounding to it is half of one.
_STORED_STEPS = 4
_DIGITS = 5


def position_scale(path: Path, key: str, positions: Tensor) -> float:
    """The distance of neighbours in a sin-cos table ``[1, L, D]`` of any float type: 1 in DiT.

    The roundest number that gives the table to the precision of its type, as half precision blurs what it is read off.

    Raises:
        WeightsError: no such table.
    """
    if positions.ndim == 3 and positions.is_floating_point():
        measured = _measured_scale(positions)
        for digits in range(1, _DIGITS + 1):
            if _is_sincos(positions, scale := float(f"{measured:.{digits}g}")):
                return scale
    how = "" if positions.dtype.itemsize > 2 else f"; if this one is not, keep {key} in float32"
    raise WeightsError(f"{path}: {key} is not DiT's sin-cos table; learned positions are not supported{how}")


def _is_sincos(positions: Tensor, scale: float) -> bool:
    _, tokens, width = positions.shape
    expected = sincos_positions(width, isqrt(tokens), scale)
    if positions.shape[1:] != expected.shape:
        return False
    tolerance = max(_TOLERANCE, _STORED_STEPS * torch.finfo(positions.dtype).eps)
    return torch.allclose(positions[0].float(), expected, rtol=0, atol=tolerance)


def _measured_scale(positions: Tensor) -> float:
    """From the lowest frequency, whose angle at the second position is far from a turn; 1 where there is none."""
    quarter = positions.shape[2] // 4
    if positions.shape[1] < 2 or quarter < 1:
        return 1.0
    sine, cosine = positions[0, 1, [quarter - 1, 2 * quarter - 1]].double()
    scale = float(torch.atan2(sine, cosine)) * 10000.0 ** ((quarter - 1) / quarter)
    return scale if scale > 0 else 1.0
