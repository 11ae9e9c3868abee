"""Which backend runs: by name, or the best one that works on this machine."""

from __future__ import annotations

import torch

from robuq_core.kernels.cpu import CpuBackend, NativeUnavailableError
from robuq_core.kernels.ops import Backend
from robuq_core.kernels.reference import ReferenceBackend

CHOICES = ("auto", "cpu", "reference")


def select_backend(name: str = "auto", threads: int | None = None, device: torch.device | str | None = None) -> Backend:
    """The backend called ``name``; ``auto`` is the native CPU backend where it is built, else the reference.

    Args:
        name: one of :data:`CHOICES`.
        threads: of the native CPU backend; ``None`` takes torch's number.
        device: where it runs, such as ``cuda:1``; ``None`` takes the backend's own choice.

    Raises:
        ValueError: an unknown name, or a backend that does not run on ``device``.
        NativeUnavailableError: ``cpu`` was asked for and its library is not built.
    """
    on_cpu = device is None or torch.device(device).type == "cpu"
    if name == "reference":
        return ReferenceBackend("cpu" if device is None else device)
    if name == "cpu":
        if not on_cpu:
            raise ValueError(f"the cpu backend does not run on {device}: choose device cpu or another backend")
        return CpuBackend(threads)
    if name != "auto":
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(CHOICES)}")
    if device is not None and not on_cpu:
        return ReferenceBackend(device)
    try:
        return CpuBackend(threads)
    except NativeUnavailableError:
        return ReferenceBackend()
