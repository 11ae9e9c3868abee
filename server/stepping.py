"""One step of many rows on one sampler, whatever of it fails; how many rows a step may have. Knows no torch.

A step that fails is repeated in halves, down to single images, so that a fault stays with its image. The row budget
is halved when memory runs out, and kept within a target time by the measured time of steps.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from robuq_core.params import RowSpec

logger = logging.getLogger(__name__)

# Full forwards without a fault after which a reduced budget grows by an eighth.
GROW_AFTER = 64
# Weight of the newest step in the running mean of its size.
SMOOTHING = 0.2
# Observations after which a size larger than those being run is forgotten, so that one slow step, which may have been
# an accident, does not keep batches small for ever: they grow again and find out.
FORGET_AFTER = 1000


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of torch's device, which is known by its name so that this module needs no torch."""
    return isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


class RowBudget:
    """Most rows of the model in one forward: halved when memory runs out, growing back slowly to ``most``."""

    def __init__(self, most: int) -> None:
        self.most = self.rows = most
        self._full_forwards = 0

    def out_of_memory(self, rows: int) -> None:
        """A forward of ``rows`` rows did not fit."""
        self.rows = max(1, min(self.rows, rows) // 2)
        self._full_forwards = 0

    def fitted(self, rows: int) -> None:
        """A forward of ``rows`` rows did fit."""
        # One row less than the budget is full too: an image may take two.
        if self.rows == self.most or rows < self.rows - 1:
            return
        self._full_forwards += 1
        if self._full_forwards >= GROW_AFTER:
            self.rows = min(self.most, self.rows + max(1, self.rows // 8))
            self._full_forwards = 0


class StepSampler(Protocol):
    """What a worker needs of a model beside what :class:`server.request.ModelInfo` says of it;
    ``robuq_core.pipeline.Sampler`` is one.

    ``start``, ``step`` and ``estimate`` are called from one thread; ``decode`` and ``decode_estimate`` from several.
    """

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        """Sizes, in rows of the model, ascending, that a forward should have seen before the first request."""

    def start(self, spec: RowSpec) -> Any: ...

    def step(self, rows: Sequence[Any]) -> None:
        """One forward that advances every row by one step. A row's result must not depend on its neighbours."""

    def decode(self, row: Any) -> np.ndarray:
        """Pixels of a finished row, uint8 ``[H, W, 3]``."""

    def estimate(self, row: Any) -> Any:
        """A cheap snapshot of the picture that the model sees in a row at its latest step."""

    def decode_estimate(self, estimate: Any) -> np.ndarray:
        """Pixels of an estimate, uint8 ``[H, W, 3]``."""


class Stepper:
    """Steps rows within a budget.

    Args:
        on_retry: called before each forward of a step but the first.
    """

    def __init__(
        self,
        max_batch_rows: int,
        clock: Callable[[], float] = time.monotonic,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.budget = RowBudget(max_batch_rows)
        self._clock = clock
        self._on_retry = on_retry
        self._measured: list[tuple[int, float]] = []

    def take_measured(self) -> list[tuple[int, float]]:
        """(rows that went through the model's blocks, seconds) of the forwards without a fault since the last call."""
        measured, self._measured = self._measured, []
        return measured

    def step(self, sampler: StepSampler, rows: Sequence[Any]) -> dict[int, Exception]:
        """Advance every row by one step; the faults by position in ``rows``.

        Rows that a failed forward has not moved are tried again in halves: a row's result does not depend on its
        neighbours, so neither does it on how a step was divided.
        """
        costs = [2 if row.guided else 1 for row in rows]
        faulty: dict[int, Exception] = {}
        pending = deque(self._attempt(sampler, rows, costs, range(len(rows)), faulty))
        while pending:
            self._on_retry()
            pending.extendleft(reversed(self._attempt(sampler, rows, costs, pending.popleft(), faulty)))
        return faulty

    def _attempt(
        self,
        sampler: StepSampler,
        rows: Sequence[Any],
        costs: Sequence[int],
        part: Sequence[int],
        faulty: dict[int, Exception],
    ) -> Sequence[Sequence[int]]:
        """Step the rows at the positions ``part``; what of it is still to be stepped, in parts."""
        size = sum([costs[i] for i in part])
        if size > self.budget.rows and len(part) > 1:
            return self._parts(part, costs)
        before = [rows[i].steps_done for i in part]
        error = self._forward(sampler, [rows[i] for i in part])
        if error is None:
            return ()
        unmoved = [i for i, done in zip(part, before, strict=True) if rows[i].steps_done == done]
        if is_out_of_memory(error):
            self.budget.out_of_memory(size)
            logger.warning("no memory for a step of %d rows; at most %d from now on", size, self.budget.rows)
        elif len(part) > 1:
            logger.warning("a step of %d rows failed (%r); retrying its halves", size, error)
        if len(part) == 1:
            faulty.update((i, error) for i in unmoved)
            return ()
        # The error ends here: its traceback keeps the failed forward's tensors, whose room the next one needs.
        middle = (len(unmoved) + 1) // 2
        return [half for half in (unmoved[:middle], unmoved[middle:]) if half]

    def _parts(self, part: Sequence[int], costs: Sequence[int]) -> list[Sequence[int]]:
        """``part`` in order, in pieces that fit into the budget as far as single images do."""
        parts: list[list[int]] = []
        room = 0
        for i in part:
            if costs[i] > room:
                parts.append([])
                room = self.budget.rows
            parts[-1].append(i)
            room -= costs[i]
        return list(parts)

    def _forward(self, sampler: StepSampler, rows: list[Any]) -> Exception | None:
        block_rows = sum([row.block_rows for row in rows])
        began = self._clock()
        try:
            sampler.step(rows)
        except Exception as error:
            return error
        else:
            self._measured.append((block_rows, self._clock() - began))
            self.budget.fitted(block_rows)
            return None


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
