"""A packed checkpoint into the samplers of an engine: one a replica."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from robuq_core.pipeline import Sampler
from server.settings import Settings


def load_samplers(path: Path | None, settings: Settings) -> tuple[Sampler, ...]:
    """Load ``path``, ``None`` for the bundled checkpoint, once, and replicate it as often as the settings ask for.

    Replicas go round the GPUs if the first one is on one. On a CPU they share its cores, unless ``threads`` is set.

    Raises:
        CheckpointError: the file cannot be used. ValueError: the backend cannot.
    """
    threads = settings.threads
    if threads is None and settings.replicas > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // settings.replicas)
    first = Sampler.from_checkpoint(path, backend=settings.backend, threads=threads)
    replicas = [first]
    for i in range(1, settings.replicas):
        device = None if first.device.type != "cuda" else f"cuda:{i % torch.cuda.device_count()}"
        replicas.append(first.replica(threads=threads, device=device))
    return tuple(replicas)
