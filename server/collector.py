"""Python's garbage collector, kept from stopping every thread while requests run."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect now, and leave what is still there out of all collections to come.

    Of a server's few hundred thousand objects nearly all stay for good, and a collection that looks at them takes a
    tenth of a second, in which no thread moves.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def collect_released() -> None:
    """Collect what was just let go of, even if :func:`settle` has left it out."""
    if gc.get_freeze_count():
        settle()
    else:
        gc.collect()
