"""One step of many rows on one sampler, whatever of it fails; how many rows a step may have. Knows no torch.

A step that fails is repeated in halves, down to single images, so that a fault stays with its image. The row budget
is halved when memory runs out, and kept within a target time by the measured time of steps.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# Full forwards without a fault after which a reduced budget grows.
GROW_AFTER = 64
# Weight of the newest full forward in the running mean of the speed.
SMOOTHING = 0.2
# Share of the target time below which more rows are tried.
QUICK = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of torch's device, which is known by its name so that this module needs no torch."""
    return isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


class RowBudget:
    """Most rows of the model in one forward.

    ``rows`` fit into memory: halved when it runs out. ``admitted`` also keep a forward within ``target_s``: cut in
    proportion by each slower one. Both grow back to ``most`` by an eighth every :data:`GROW_AFTER` full forwards.
    """

    def __init__(self, most: int, target_s: float | None = None) -> None:
        self.most = self.rows = self._in_time = most
        self.rows_per_s = 0.0  # of full forwards
        self._target_s = target_s
        self._full_forwards = 0

    @property
    def admitted(self) -> int:
        return min(self.rows, self._in_time)

    def restart(self, rows: int, seconds: float) -> None:
        """Forget the times of a warm-up, but for that of its last forward."""
        self._in_time, self.rows_per_s = self.most, rows / seconds if seconds else 0.0
        self.fitted(rows, seconds)

    def out_of_memory(self, rows: int) -> None:
        """A forward of ``rows`` rows did not fit."""
        self.rows = max(1, min(self.rows, rows) // 2)
        self._full_forwards = 0

    def fitted(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows did fit, and took ``seconds``."""
        quick = self._target_s is None or seconds < QUICK * self._target_s
        if self._target_s is not None and rows and seconds > self._target_s:
            self._in_time = max(1, int(rows * self._target_s / seconds))
        # One row less than the budget is full too: an image may take two.
        if not 0 < rows >= self.admitted - 1:
            return
        if seconds > 0:
            weight = SMOOTHING if self.rows_per_s else 1.0
            self.rows_per_s += weight * (rows / seconds - self.rows_per_s)
        self._full_forwards += 1
        if self._full_forwards >= GROW_AFTER:
            self._full_forwards = 0
            if rows >= self.rows - 1:
                self.rows = self._grown(self.rows)
            if quick:
                self._in_time = self._grown(self._in_time)

    def _grown(self, rows: int) -> int:
        return min(self.most, rows + max(1, rows // 8))


class Stepper:
    """Steps rows of a :class:`robuq_core.pipeline.Sampler` within a budget.

    Args:
        on_retry: called before each forward of a step but the first.
    """

    def __init__(
        self,
        max_batch_rows: int,
        clock: Callable[[], float] = time.monotonic,
        on_retry: Callable[[], None] = lambda: None,
        target_step_s: float | None = None,
    ) -> None:
        self.budget = RowBudget(max_batch_rows, target_step_s)
        self._clock = clock
        self._on_retry = on_retry
        self._measured: list[tuple[int, float]] = []

    def take_measured(self) -> list[tuple[int, float]]:
        """(rows that went through the model's blocks, seconds) of the forwards without a fault since the last call."""
        measured, self._measured = self._measured, []
        return measured

    def step(self, sampler: Any, rows: Sequence[Any]) -> dict[int, Exception]:
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
        sampler: Any,
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
            logger.warning("out of memory in a step of %d rows; at most %d rows from now on", size, self.budget.rows)
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

    def _forward(self, sampler: Any, rows: list[Any]) -> Exception | None:
        block_rows = sum([row.block_rows for row in rows])
        began = self._clock()
        try:
            sampler.step(rows)
        except Exception as error:
            return error
        seconds = self._clock() - began
        self._measured.append((block_rows, seconds))
        self.budget.fitted(block_rows, seconds)
        return None
