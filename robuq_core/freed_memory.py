"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import contextlib
import ctypes


def give_freed_memory_back() -> None:
    """Pages of freed tensors that lie between those which stay: gigabytes, after the many layers of a large network."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
