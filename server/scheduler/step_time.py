"""How long a step of so many rows takes, learnt from the steps that were run."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

# Weight of the newest step in the running mean of its size.
SMOOTHING = 0.2
# Observations after which a size larger than those being run is forgotten, so that one slow step, which may have been
# an accident, does not keep batches small for ever: they grow again and find out.
FORGET_AFTER = 1000


@dataclass
class _Point:
    seconds: float
    seen_at: int  # number of the observation


class StepTimeCurve:
    """Seconds of a step as a non-decreasing function of its rows. Not thread-safe.

    Each size keeps a running mean; isotonic regression makes the means monotone, lines join them. Below the smallest
    size that was run its time is taken, beyond the largest the time grows in proportion: neither is too low.
    """

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._sizes: list[int] = []  # keys of _points, ascending
        self._fitted: list[float] | None = None  # monotone means by position in _sizes; None: to be computed
        self._observations = 0

    def observe(self, rows: int, seconds: float) -> None:
        """A step of ``rows`` rows took ``seconds``."""
        if rows < 1 or not 0 <= seconds < float("inf"):
            raise ValueError(f"a step needs at least 1 row and a finite time, not {rows} rows in {seconds} s")
        self._observations += 1
        self._fitted = None
        point = self._points.get(rows)
        if point is None:
            self._points[rows] = _Point(seconds, self._observations)
            bisect.insort(self._sizes, rows)
        else:
            point.seconds += SMOOTHING * (seconds - point.seconds)
            point.seen_at = self._observations
        largest = self._sizes[-1]
        if self._observations - self._points[largest].seen_at > FORGET_AFTER:
            del self._points[self._sizes.pop()]

    def seconds(self, rows: int) -> float:
        """Expected seconds of a step of ``rows`` rows; 0 before anything was observed."""
        if not self._sizes:
            return 0.0
        fitted = self._fit()
        after = bisect.bisect_left(self._sizes, rows)
        if after == len(self._sizes):
            return fitted[-1] * rows / self._sizes[-1]
        if after == 0:
            return fitted[0]
        low, high = self._sizes[after - 1], self._sizes[after]
        share = (rows - low) / (high - low)
        return fitted[after - 1] + share * (fitted[after] - fitted[after - 1])

    def rows_within(self, target_s: float, max_rows: int) -> int:
        """Most rows, 1..``max_rows``, whose step is expected to take at most ``target_s``; 1 if none is."""
        return max(1, bisect.bisect_right(range(1, max_rows + 1), target_s, key=self.seconds))

    def _fit(self) -> list[float]:
        """Least-squares non-decreasing fit of the means: pool adjacent violators."""
        if self._fitted is None:
            blocks: list[tuple[float, int]] = []  # mean, sizes in the block
            for size in self._sizes:
                mean, count = self._points[size].seconds, 1
                while blocks and blocks[-1][0] > mean:
                    other, others = blocks.pop()
                    mean = (mean * count + other * others) / (count + others)
                    count += others
                blocks.append((mean, count))
            self._fitted = [mean for mean, count in blocks for _ in range(count)]
        return self._fitted
