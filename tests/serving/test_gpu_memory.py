"""GPU memory is in the metrics where GPUs are used, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from server.gpu_memory import watch_gpu_memory
from server.metrics import Metrics


def test_without_a_gpu_there_is_no_series() -> None:
    metrics = Metrics(4)
    watch_gpu_memory(metrics)
    assert "gpu_memory" not in metrics.render().decode()


def test_every_gpu_has_its_own_series_read_on_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {0: 100, 1: 200}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: memory[gpu])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: memory[gpu] + 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: memory[gpu] + 2)
    metrics = Metrics(4)
    watch_gpu_memory(metrics)
    memory[1] = 300

    def read(name: str, gpu: int) -> float | None:
        return metrics.registry.get_sample_value(f"robuq_gpu_memory_{name}_bytes", {"gpu": str(gpu)})

    assert [read(name, gpu) for gpu in (0, 1) for name in ("used", "reserved", "peak")] == [
        100,
        101,
        102,
        300,
        301,
        302,
    ]
