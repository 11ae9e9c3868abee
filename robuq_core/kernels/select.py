"""Which backend runs: by name, or the best one that works on this machine."""

from __future__ import annotations

from robuq_core.kernels.cpu import CpuBackend, NativeUnavailableError
from robuq_core.kernels.ops import Backend
from robuq_core.kernels.reference import ReferenceBackend

CHOICES = ("auto", "cpu", "reference")


def select_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend called ``name``; ``auto`` is the native CPU backend where it is built, else the reference.

    Args:
        name: one of :data:`CHOICES`.
        threads: of the native CPU backend; ``None`` takes torch's number.

    Raises:
        ValueError: an unknown name.
        NativeUnavailableError: ``cpu`` was asked for and its library is not built.
    """
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        return CpuBackend(threads)
    if name != "auto":
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(CHOICES)}")
    try:
        return CpuBackend(threads)
    except NativeUnavailableError:
        return ReferenceBackend()
