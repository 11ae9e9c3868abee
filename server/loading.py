"""A packed checkpoint into the samplers of an engine: one a replica."""

from __future__ import annotations

from pathlib import Path

import torch

from robuq_core.errors import UserError
from robuq_core.hub import resolve_checkpoint
from robuq_core.pipeline import Sampler
from server.settings import Settings


def load_samplers(path: Path | None, settings: Settings) -> tuple[Sampler, ...]:
    """Load ``path``, ``None`` for the bundled checkpoint, once, and replicate it as often as the settings ask for.

    On GPUs each replica has one of its own. On a CPU they divide the threads, and share the weights.

    Each has a decoder on its device; those on one device share it.

    Raises:
        CheckpointError, DecoderError: the file or its decoder cannot be used. ValueError: the backend cannot.
        UserError: more replicas than there are threads or GPUs.
    """
    replicas, threads = settings.replicas, settings.threads
    if replicas == 1:
        return (_load(path, settings, threads),)
    threads = threads or torch.get_num_threads()
    share = max(1, threads // replicas)
    first = _load(path, settings, share)
    if first.device.type == "cuda":
        _check(replicas, torch.cuda.device_count(), "GPU(s)")
        return first, *(first.replica(device=f"cuda:{i}") for i in range(1, replicas))
    _check(replicas, threads, "CPU thread(s)")
    return first, *(first.replica(threads=share) for _ in range(1, replicas))


def located(settings: Settings) -> Settings:
    """``settings`` with the checkpoint as a file, downloaded if it is on the hub.

    Raises:
        CheckpointError: there is none.
    """
    if settings.checkpoint is None:
        return settings
    return settings.model_copy(update={"checkpoint": resolve_checkpoint(settings.checkpoint)})


def _load(path: Path | None, settings: Settings, threads: int | None) -> Sampler:
    return Sampler.from_checkpoint(path, decoder=settings.decoder, backend=settings.backend, threads=threads)


def _check(replicas: int, available: int, what: str) -> None:
    if replicas > available:
        raise UserError(f"--replicas {replicas} is more than the {available} {what} here; give at most {available}")
