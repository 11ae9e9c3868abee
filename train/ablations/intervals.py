"""Means, and ratios of paired runs, with 95% intervals of Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95% quantiles of Student's t for 1..10 degrees of freedom; beyond, the last, which is too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """``low``, ``high``: where the true value lies with 95% confidence; infinite for a single run."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Arithmetic mean of independent runs."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = _T95[min(len(values) - 1, len(_T95)) - 1] * math.sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Geometric mean of ``above[i] / below[i]``: runs of one seed share batches, noise and classes, so they are paired.

    Raises:
        ValueError: sequences of different lengths, or a value that is not positive.
    """
    logs = mean_interval([math.log(a / b) for a, b in zip(above, below, strict=True)])
    return Interval(*(math.exp(each) if each < 700 else math.inf for each in (logs.value, logs.low, logs.high)))
