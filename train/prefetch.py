"""Batches made by a thread while the step before runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

_AHEAD = 2


class Prefetcher(Generic[Batch]):
    """``make(first), make(first + 1), ...`` below ``end``, made in order by one thread, at most two ahead."""

    def __init__(self, make: Callable[[int], Batch], first: int, end: int) -> None:
        self._make, self._next, self._end = make, first, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: list[Future[Batch]] = []

    def next(self) -> Batch:
        """The next batch; raises what making it raised."""
        while self._next < self._end and len(self._ahead) <= _AHEAD:
            self._ahead.append(self._pool.submit(self._make, self._next))
            self._next += 1
        return self._ahead.pop(0).result()

    def close(self) -> None:
        """Stop the thread and drop what was not asked for."""
        self._pool.shutdown(cancel_futures=True)
