"""Return freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes


def give_freed_memory_back() -> None:
    """``malloc_trim``: pages of freed tensors between live ones, gigabytes after the layers of a large network."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
