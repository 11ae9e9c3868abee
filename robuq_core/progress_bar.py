"""A bar on standard error that is used as diffusers' pipelines use theirs: looped over, or entered and updated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class ProgressBar(Generic[Item]):
    """Counts the ``items`` that a loop over it has done with; within ``with``, also what :meth:`update` is told.

    Args:
        total: how many there will be; by default as many as ``items`` says.
        disable: draw nothing. desc: what stands before the bar. leave: keep it when it is done.
    """

    def __init__(
        self,
        items: Iterable[Item],
        total: int | None = None,
        *,
        disable: bool = False,
        desc: str = "",
        leave: bool = True,
    ) -> None:
        self._items = items
        self._total = total or length_hint(items) or None
        self._disable, self._desc, self._leave = disable, desc, leave
        self._bar: Any = None

    def __enter__(self) -> ProgressBar[Item]:
        if self._bar is None and not self._disable:
            from rich.console import Console
            from rich.progress import Progress

            # Not its track(): the thread of that outlives a loop that is broken off.
            self._bar = Progress(console=Console(stderr=True), transient=not self._leave)
            self._bar.add_task(self._desc, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], n)

    def close(self) -> None:
        """Draw no more."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
