"""One task of :mod:`bench.convert` in a process of its own: ``python -m bench.convert_child TASK JSON``.

It prints one JSON object. What a task needs is imported in it, so that its memory is its own.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOOK_S = 0.02


def write(config: dict[str, Any], target: str) -> dict[str, Any]:
    """Random weights of a shape as an official ``.pt``."""
    from robuq_core.bench.source import plain_network
    from robuq_core.config import ModelConfig
    from robuq_core.models.adapters import save_official

    save_official(plain_network(ModelConfig.model_validate(config)), Path(target))
    return {}


def convert(source: str, target: str, heads: int | None) -> dict[str, Any]:
    """From one full-precision form to another."""
    from robuq_core.convert import convert_full_precision

    convert_full_precision(Path(source), Path(target), num_heads=heads)
    return {}


def pack(source: str, target: str, heads: int, planes: int) -> dict[str, Any]:
    """Post-training quantisation, its own measurement included."""
    from robuq_core.convert import pack_untrained, untrained_quant

    result = pack_untrained(Path(source), Path(target), untrained_quant(planes), num_heads=heads)
    return {"relative_error": result.relative_error}


def sample(path: str, steps: int, guidance_scale: float) -> dict[str, Any]:
    """Load a packed file and draw what it draws, latents as they are.

    Raises:
        BenchError: it is not finite.
    """
    import torch

    from robuq_core.bench.source import open_source
    from robuq_core.bench.timing import BenchError
    from robuq_core.kernels.backends import select_backend
    from robuq_core.pipeline import RowSpec

    ops, source = select_backend(), open_source(None, Path(path))
    sampler = source.sampler(source.packed(ops), ops.name, ops.device)
    row = sampler.start(RowSpec(0, 0, steps, guidance_scale, "ddim"))
    while not row.done:
        sampler.step([row])
    if not bool(torch.isfinite(row.x).all()):
        raise BenchError(f"{path} draws what is not finite")
    return {"backend": ops.name}


class PrivateMemory:
    """Most memory beside mapped files, looked at every 20 ms from a thread; None where the system does not tell."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> PrivateMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        with suppress(OSError, StopIteration):  # not Linux
            while True:
                lines = Path("/proc/self/status").read_text().splitlines()
                now = int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024
                self.peak_bytes = max(now, self.peak_bytes or 0)
                if self._stop.wait(_LOOK_S):
                    return


def main() -> None:
    import torch

    from robuq_core.bench.child import peak

    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "write": write,
        "convert": convert,
        "pack": pack,
        "sample": sample,
    }
    with PrivateMemory() as memory:
        figures = tasks[sys.argv[1]](**json.loads(sys.argv[2]))
    whole = peak(torch.device("cpu"))
    print(json.dumps({**figures, "peak_bytes": whole, "private_peak_bytes": memory.peak_bytes}))


if __name__ == "__main__":
    main()
