"""Memory of the GPUs in the metrics, where GPUs are used."""

from __future__ import annotations

import torch

from server.metrics import Metrics


def watch_gpu_memory(metrics: Metrics) -> None:
    """Report every GPU that torch sees, once something of this process lies on one; else no series appears."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        metrics.watch_gpu_memory(
            torch.cuda.device_count(),
            used=torch.cuda.memory_allocated,
            reserved=torch.cuda.memory_reserved,
            peak=torch.cuda.max_memory_allocated,
        )
