"""One step of many rows on one sampler, whatever of it fails: in parts that fit into memory, down to single images."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from robuq_core.errors import TooSlowError
from server.engine.model import StepSampler

logger = logging.getLogger(__name__)

# Full forwards without a fault after which a reduced budget grows by an eighth.
GROW_AFTER = 64


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


class Stepper:
    """Steps rows for one replica and knows how long the forward under way has been running."""

    def __init__(self, max_batch_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = RowBudget(max_batch_rows)
        self.step_began: float | None = None  # of the forward under way
        self._clock = clock
        self._measured: list[tuple[int, float]] = []

    def running_s(self) -> float:
        """Seconds since the forward under way began; 0 between forwards."""
        began = self.step_began
        return 0.0 if began is None else self._clock() - began

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
        elif len(part) > 1 and not isinstance(error, TooSlowError):
            logger.warning("a step of %d rows failed (%r); retrying its halves", size, error)
        if len(part) == 1 or isinstance(error, TooSlowError):  # halves would take as long, one after the other
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
        self.step_began = began = self._clock()
        try:
            sampler.step(rows)
        except Exception as error:
            return error
        else:
            self._measured.append((block_rows, self._clock() - began))
            self.budget.fitted(block_rows)
            return None
        finally:
            self.step_began = None
