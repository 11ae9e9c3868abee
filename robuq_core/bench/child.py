"""What a fresh process measures of itself: ``python -m robuq_core.bench.child TASK JSON``, one JSON object on stdout.

Memory and loading are properties of a process, so each measurement has one of its own (see ``processes.py``).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory(
    path: str, side: str, batch: int, steps: int, backend: str, threads: int | None, device: str | None
) -> dict[str, int]:
    """Peak memory of ``steps`` guided sampling steps of ``batch`` images, loading included, over that of the imports.

    ``side``: ``robuq``, or ``fp32`` and ``bf16``: the plain network of the file's shape, random weights made in place.
    """
    import torch

    from robuq_core.bench.source import header_sampler, plain_network
    from robuq_core.checkpoint import read_checkpoint, read_header
    from robuq_core.kernels.backends import select_backend
    from robuq_core.models.packed_dit import PackedDiT
    from robuq_core.pipeline import Denoiser, RowSpec

    if threads:
        torch.set_num_threads(threads)
    ops = select_backend(backend, threads, device)
    header = read_header(Path(path))
    if side != "robuq":
        # What making a network imports is not the network's memory.
        plain_network(header.model.model_copy(update={"depth": 1, "hidden_size": 4 * header.model.num_heads}))
    idle = start_peak(ops.device)
    if side == "robuq":
        checkpoint = read_checkpoint(Path(path))
        quantized = header.quant.attention_bits is not None
        model: Denoiser = PackedDiT(header.model, checkpoint.dense, checkpoint.layers, ops, quantized)
        del checkpoint
    else:
        dtype = torch.bfloat16 if side == "bf16" else torch.float32
        model = _Plain(plain_network(header.model, ops.device, dtype), dtype)
    sampler = header_sampler(header, model, side, ops.name, ops.device)
    rows = [
        sampler.start(
            RowSpec(i % sampler.valid_classes, i, steps, 1.5 if sampler.can_guide else 1.0, sampler.defaults.sampler)
        )
        for i in range(batch)
    ]
    while not rows[0].done:
        sampler.step(rows)
    return {"idle_bytes": idle, "over_idle_bytes": peak(ops.device) - idle}


class _Plain:
    """A plain network of any float type behind the sampler's float32."""

    def __init__(self, network: Any, dtype: Any) -> None:
        self._network, self._dtype = network, dtype

    def forward(self, x: Any, timesteps: Any, classes: Any, /) -> Any:
        return self._network(x.to(self._dtype), timesteps, classes).float()


def loading(
    path: str, started: float, backend: str, threads: int | None, device: str | None
) -> dict[str, float | None]:
    """Seconds from ``started`` (the parent's clock, just before this process) to each milestone."""
    import torch

    from robuq_core.bench.source import header_sampler
    from robuq_core.checkpoint import read_checkpoint
    from robuq_core.kernels.backends import select_backend
    from robuq_core.models.packed_dit import PackedDiT
    from robuq_core.pipeline import RowSpec

    imported = time.time()
    if threads:
        torch.set_num_threads(threads)
    ops = select_backend(backend, threads, device)
    checkpoint = read_checkpoint(Path(path))
    header = checkpoint.header
    quantized = header.quant.attention_bits is not None
    model = PackedDiT(header.model, checkpoint.dense, checkpoint.layers, ops, quantized)
    sampler = header_sampler(header, model, "loading", ops.name, ops.device)
    ready = time.time()
    defaults = header.sampler
    row = sampler.start(RowSpec(0, 0, defaults.steps, defaults.guidance_scale, defaults.sampler))
    sampler.step([row])
    stepped = time.time()
    drawn = None
    if header.decoder == "pixels":
        while not row.done:
            sampler.step([row])
        sampler.decode(row)
        drawn = time.time() - started
    return {
        "import_s": imported - started,
        "load_s": ready - imported,
        "ready_s": ready - started,
        "first_step_s": stepped - started,
        "first_image_s": drawn,
    }


def start_peak(device: Any) -> int:
    """Bytes in use now; from here on the peak counts."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    # 5: the kernel's peak of resident memory starts anew. Not everywhere; then the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak(device: Any) -> int:
    """Most bytes in use since :func:`start_peak`; without it, since the process began."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    tasks: dict[str, Callable[..., object]] = {"memory": memory, "loading": loading}
    print(json.dumps(tasks[sys.argv[1]](**json.loads(sys.argv[2]))))
