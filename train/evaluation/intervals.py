"""Means over seeds and how far they can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Student's t at 97.5% for 1..10 degrees of freedom; beyond, an expansion is right to three digits.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_Z = 1.959964


def student_t(degrees: int) -> float:
    """The 97.5% point of Student's t with ``degrees`` of freedom, 1 or more."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    first = (_Z**3 + _Z) / 4
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / degrees + second / degrees**2 + third / degrees**3


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over seeds with its 95% t-interval; ``half_width`` none of a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float | None:
        count = len(self.values)
        return None if count < 2 else student_t(count - 1) * statistics.stdev(self.values) / math.sqrt(count)

    def as_dict(self) -> dict[str, Any]:
        """``mean``, ``interval`` (low, high; none of one seed) and ``by_seed``."""
        half = self.half_width
        interval = None if half is None else [self.mean - half, self.mean + half]
        return {"mean": self.mean, "interval": interval, "by_seed": list(self.values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """``values`` over ``base``, seed by seed; none where a base is zero."""
    if any(each == 0 for each in base):
        return None
    return Estimate(tuple(a / b for a, b in zip(values, base, strict=True)))
