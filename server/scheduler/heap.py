"""A priority queue whose items can be taken out of the middle."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Heap(Generic[Item]):
    """Items by ascending key, equal keys in order of insertion. Each operation takes O(log n), amortised."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Item]] = []
        self._live: dict[Item, int] = {}  # item -> number of its entry; other entries are dead
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: Item) -> bool:
        return item in self._live

    def push(self, key: float, item: Item) -> None:
        """Insert an item, or move it behind those with an equal key."""
        number = next(self._numbers)
        self._live[item] = number
        heapq.heappush(self._entries, (key, number, item))
        self._compact()

    def first(self) -> tuple[float, Item] | None:
        """The least key with its item."""
        while self._entries:
            key, number, item = self._entries[0]
            if self._live.get(item) == number:
                return key, item
            heapq.heappop(self._entries)
        return None

    def discard(self, item: Item) -> None:
        """Take an item out; an absent one is no error."""
        self._live.pop(item, None)
        self._compact()

    def _compact(self) -> None:
        # Dead entries are dropped when they come first, or when they outnumber the live ones.
        if len(self._entries) > 2 * len(self._live) + 16:
            self._entries = [entry for entry in self._entries if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)
