"""Progress bars of loops."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar, cast

from rich.progress import track

Item = TypeVar("Item")


@contextmanager
def tracked(items: Collection[Item], description: str) -> Iterator[Iterator[Item]]:
    """``items`` one by one beside a bar, which ends with the block.

    A plain ``track`` whose loop fails is left to the garbage collector; where that happens to run in another bar's
    thread, the two bars wait for each other for ever.
    """
    with closing(cast(Generator[Item, None, None], track(items, description))) as bar:
        yield bar
