"""torch's OpenMP threads and those of the native kernels share the cores.

After each parallel region torch's threads keep spinning for a while, on cores that the kernels' threads need next.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache


def sleep_between_regions() -> None:
    """Let torch's threads sleep between parallel regions, unless ``OMP_WAIT_POLICY`` is set.

    OpenMP reads its settings once: call this before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@lru_cache(maxsize=1)
def _openmp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no access to the process's own symbols
        return None
    return library if hasattr(library, "omp_set_num_threads") else None


@contextmanager
def on_one_thread(wanted: bool = True) -> Iterator[None]:
    """Run torch's operators of the calling thread on one thread, if torch uses OpenMP and ``wanted``.

    :func:`torch.set_num_threads` would also affect threads that start meanwhile.
    """
    library = _openmp() if wanted else None
    if library is None:
        yield
        return
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
