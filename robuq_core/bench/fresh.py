"""What only a fresh process can measure of itself: peak memory while it samples, and the time to each milestone.

``python -m robuq_core.bench.fresh JSON`` is that process: arguments of :func:`sample` in, one JSON object out.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor

from robuq_core.bench.report import Loading, MemoryUse
from robuq_core.bench.source import Source, header_sampler, plain_network
from robuq_core.bench.timing import BenchError
from robuq_core.checkpoint import Checkpoint, Description, read_checkpoint, read_header, write_packed
from robuq_core.kernels.backends import select_backend
from robuq_core.models.dit import DiT
from robuq_core.pipeline import RowSpec

MEMORY_SIDES = ("robuq", "fp32", "bf16")
_TIMEOUT_S = 1800


@contextmanager
def as_file(source: Source) -> Iterator[Path]:
    """The packed file of ``source``: its own, or a temporary one of its random weights."""
    if source.path is not None:
        yield source.path
        return
    with TemporaryDirectory(prefix="robuq-bench-") as folder:
        path = Path(folder) / "random.safetensors"
        write_random(source.checkpoint, path)
        yield path


def write_random(checkpoint: Checkpoint, path: Path) -> int:
    """Write random weights as a packed file; returns its bytes."""
    header = checkpoint.header
    about = Description(header.quant, header.diffusion, header.sampler, (), {"weights": "random"}, header.decoder)
    write_packed(path, header.model, checkpoint.dense, checkpoint.layers, about)
    return path.stat().st_size


def measure_memory(
    name: str, path: Path, batch: int, where: dict[str, Any], sides: Sequence[str] = MEMORY_SIDES
) -> list[MemoryUse]:
    """Peak memory of each of ``sides`` while it samples ``batch`` guided images of the network in ``path``. ``where``:
    the arguments of :func:`robuq_core.kernels.backends.select_backend`.

    Raises:
        BenchError: a process failed.
    """
    figures = {side: _run({"path": str(path), "side": side, "batch": batch, "memory": True} | where) for side in sides}
    return [
        MemoryUse(model=name, side=side, batch=batch, idle_bytes=f["idle_bytes"], over_idle_bytes=f["over_idle_bytes"])
        for side, f in figures.items()
    ]


def measure_loading(name: str, path: Path, where: dict[str, Any], runs: int) -> Loading:
    """Medians over ``runs`` fresh processes; the file is in the page cache, as the run before has read it.

    Raises:
        BenchError: a process failed.
    """
    samples = [_run({"path": str(path), "side": "robuq", "batch": 1, "memory": False} | where) for _ in range(runs)]
    keys = [key for key in samples[0] if key.endswith("_s")]
    medians = {key: None if samples[0][key] is None else median(sample[key] for sample in samples) for key in keys}
    return Loading(model=name, file_bytes=path.stat().st_size, **medians)


def _run(arguments: dict[str, Any]) -> dict[str, Any]:
    """What :func:`sample` gives in a process of its own."""
    started = json.dumps(arguments | {"started": time.time()})
    what = "memory" if arguments["memory"] else "loading"
    try:
        command = [sys.executable, "-m", "robuq_core.bench.fresh", started]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"measuring {what} took longer than {_TIMEOUT_S} s: choose a smaller model or batch") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BenchError(f"measuring {what} failed: {last}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


class _Plain:
    """A plain network of any float type behind the sampler's float32."""

    def __init__(self, network: DiT, dtype: torch.dtype) -> None:
        self._network, self._dtype = network, dtype

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor, /) -> Tensor:
        out: Tensor = self._network(x.to(self._dtype), timesteps, classes)
        return out.float()


def sample(
    path: str,
    side: str,
    batch: int,
    memory: bool,
    started: float,
    backend: str = "auto",
    threads: int | None = None,
    device: str | None = None,
) -> dict[str, float | None]:
    """Load and sample: peak memory over that of the imports, and seconds from ``started``, the parent's clock.

    ``side``: ``robuq``, or ``fp32`` and ``bf16``: the plain network of the file's shape, random weights made in place.
    ``memory``: two guided steps; else the checkpoint's defaults, of a latent model one step.
    """
    imported = time.time()
    if threads:
        torch.set_num_threads(threads)
    ops = select_backend(backend, threads, device)
    header = read_header(Path(path))
    draws = header.decoder == "pixels"
    if side != "robuq":  # what making a network imports is not the network's memory
        plain_network(header.model.model_copy(update={"depth": 1, "hidden_size": 4 * header.model.num_heads}))
    idle = _start_peak(ops.device)
    if side == "robuq":
        model: Any = Source("", read_checkpoint(Path(path))).packed(ops)
    else:
        dtype = torch.bfloat16 if side == "bf16" else torch.float32
        model = _Plain(plain_network(header.model, ops.device, dtype), dtype)
    sampler = header_sampler(header, model, side, ops.name, ops.device)
    ready = time.time()
    defaults = header.sampler
    steps = 2 if memory else defaults.steps if draws else 1
    scale = 1.5 if memory and sampler.can_guide else 1.0 if memory else defaults.guidance_scale
    specs = [RowSpec(i % sampler.valid_classes, i, steps, scale, defaults.sampler) for i in range(batch)]
    rows = [sampler.start(spec) for spec in specs]
    sampler.step(rows)
    stepped = time.time()
    while not rows[0].done:
        sampler.step(rows)
    if draws:
        sampler.decode(rows[0])
    return {
        "idle_bytes": idle,
        "over_idle_bytes": _peak(ops.device) - idle,
        "import_s": imported - started,
        "load_s": ready - imported,
        "ready_s": ready - started,
        "first_step_s": stepped - started,
        "first_image_s": time.time() - started if draws else None,
    }


def _start_peak(device: torch.device) -> int:
    """Bytes in use now; from here on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    # 5: the kernel's peak of resident memory starts anew. Not everywhere; then the peak is that of the whole process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def _peak(device: torch.device) -> int:
    """Most bytes in use since :func:`_start_peak`; without it, since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(sample(**json.loads(sys.argv[1]))))
