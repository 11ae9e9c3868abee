"""Measurements that need a process of their own: peak memory of sampling, and the time from start to first picture."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from robuq_core.bench.report import Loading, MemoryUse
from robuq_core.bench.source import Source
from robuq_core.bench.timing import BenchError
from robuq_core.checkpoint import Description, write_packed

MEMORY_SIDES = ("robuq", "fp32", "bf16")
_MEMORY_STEPS = 2
_TIMEOUT_S = 1800


@contextmanager
def as_file(source: Source) -> Iterator[Path]:
    """The packed file of ``source``: its own, or a temporary one of its random weights."""
    if source.path is not None:
        yield source.path
        return
    with TemporaryDirectory(prefix="robuq-bench-") as folder:
        path = Path(folder) / "random.safetensors"
        write_random(source, path)
        yield path


def write_random(source: Source, path: Path) -> int:
    """Write the weights of ``source`` as a packed file; returns its bytes."""
    checkpoint = source.checkpoint
    header = checkpoint.header
    about = Description(header.quant, header.diffusion, header.sampler, (), {"weights": "random"}, header.decoder)
    write_packed(path, header.model, checkpoint.dense, checkpoint.layers, about)
    return path.stat().st_size


def measure_memory(
    name: str, path: Path, batch: int, where: dict[str, Any], sides: tuple[str, ...] = MEMORY_SIDES
) -> list[MemoryUse]:
    """Peak memory of each of ``sides`` while it samples ``batch`` guided images of the network in ``path``. ``where``:
    the arguments of :func:`robuq_core.kernels.backends.select_backend`.

    Raises:
        BenchError: a process failed.
    """
    results = []
    for side in sides:
        arguments = {"path": str(path), "side": side, "batch": batch, "steps": _MEMORY_STEPS}
        figures = run_child("memory", arguments | where)
        results.append(MemoryUse(model=name, side=side, batch=batch, **figures))
    return results


def measure_loading(name: str, path: Path, where: dict[str, Any], runs: int) -> Loading:
    """Medians over ``runs`` fresh processes; the file is in the page cache, as the run before has read it.

    Raises:
        BenchError: a process failed.
    """
    samples = [run_child("loading", {"path": str(path), "started": time.time()} | where) for _ in range(runs)]
    figures = {key: None if samples[0][key] is None else median(s[key] for s in samples) for key in samples[0]}
    return Loading(model=name, file_bytes=path.stat().st_size, **figures)


def run_child(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process, ``python -m robuq_core.bench.child TASK JSON``, prints last: one JSON object.

    Raises:
        BenchError: it failed, or took too long.
    """
    command = [sys.executable, "-m", "robuq_core.bench.child", task, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"measuring {task} took longer than {_TIMEOUT_S} s: choose a smaller model or batch") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BenchError(f"measuring {task} failed: {last}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
