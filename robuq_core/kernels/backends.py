"""Which backend runs: by name, or the best one that works on this machine."""

from __future__ import annotations

import importlib.util
import logging

import torch

from robuq_core.errors import UserError
from robuq_core.kernels.cpu import CpuBackend, NativeUnavailableError
from robuq_core.kernels.ops import Backend
from robuq_core.kernels.reference import ReferenceBackend

logger = logging.getLogger(__name__)

CHOICES = ("auto", "cpu", "triton", "reference")


class BackendUnavailableError(UserError, RuntimeError):
    """A backend's package is not installed."""


def select_backend(name: str = "auto", threads: int | None = None, device: torch.device | str | None = None) -> Backend:
    """The backend called ``name``; ``auto`` is Triton on a GPU that it runs on, else the native CPU backend where it is
    built, else the reference.

    Args:
        name: one of :data:`CHOICES`.
        threads: of the native CPU backend; ``None`` takes torch's number.
        device: where it runs, such as ``cuda:1``; ``None`` takes the backend's own choice.

    Raises:
        ValueError: an unknown name, or a backend that does not run on ``device``.
        NativeUnavailableError: ``cpu`` was asked for and its library is not built.
        BackendUnavailableError, TritonUnavailableError: ``triton`` was asked for and is not installed, or has no GPU.
    """
    on_cpu = device is None or torch.device(device).type == "cpu"
    if name == "reference":
        return ReferenceBackend("cpu" if device is None else device)
    if name == "cpu":
        if not on_cpu:
            raise ValueError(f"the cpu backend does not run on {device}: choose device cpu or another backend")
        return CpuBackend(threads)
    if name == "triton":
        return _triton_backend(device)
    if name != "auto":
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(CHOICES)}")
    if _triton_runs_on(device):
        return _triton_backend(device)
    if device is not None and not on_cpu:
        return ReferenceBackend(device)
    try:
        return CpuBackend(threads)
    except NativeUnavailableError as error:
        logger.warning("%s; using the reference backend, which is many times slower", error)
        return ReferenceBackend()


def _triton_runs_on(device: torch.device | str | None) -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    chosen = torch.device("cuda" if device is None else device)
    return chosen.type == "cuda" and torch.cuda.get_device_capability(chosen) >= (8, 0)


def _triton_backend(device: torch.device | str | None) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError("the triton backend needs the triton package: pip install triton, "
                                      "or choose backend cpu")  # fmt: skip
    # Imported late: loading Triton takes a second, and it exists for few platforms.
    from robuq_core.kernels.triton.backend import TritonBackend

    return TritonBackend(device)
