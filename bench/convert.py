"""What it takes to bring weights of a published size in: time and peak memory of each conversion, and of one image.

``python -m bench.convert --preset DiT-XL/2 --out report.json``: a random official ``.pt`` goes to a diffusers folder
and back, is packed without training with one and three planes, and each packed file draws one guided image. Each task
has a process of its own, timed from its start to its end; what it reads was written just before, so the page cache may
have it. No figure without its check: the way there and back must be exact, and what is drawn finite. The files of
DiT-XL/2, in TMPDIR, take 9 GB.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from robuq_core.bench.machine import machine
from robuq_core.bench.processes import run_child
from robuq_core.bench.timing import BenchError
from robuq_core.cli_support import reported
from robuq_core.config import ModelConfig
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.models.adapters_files import load_pickle, state_dict_in
from robuq_core.models.presets import preset

PLANES = (1, 3)


@dataclass(frozen=True)
class TaskResult:
    """One task in a process of its own.

    ``peak_bytes``: of all its resident memory, imports and mapped files included; ``private_peak_bytes``: without
    mapped files, which the system can let go. ``file_bytes``: of what it wrote. ``relative_error``: of packing, on
    random inputs.
    """

    name: str
    seconds: float
    peak_bytes: int
    private_peak_bytes: int | None
    file_bytes: int | None = None
    relative_error: float | None = None
    backend: str | None = None


def measure(config: ModelConfig, folder: Path, steps: int, guidance_scale: float) -> Iterator[TaskResult]:
    """Every task in turn, with its files in ``folder``.

    Raises:
        BenchError: a task failed, the way there and back is not exact, or fewer planes come closer than more.
    """
    official, pipeline, back = folder / "official.pt", folder / "pipeline", folder / "back.pt"
    heads = config.num_heads
    yield _task("write official", "write", official, config=config.model_dump(mode="json"))
    yield _task("official to diffusers", "convert", pipeline, source=str(official), heads=heads)
    yield _task("diffusers to official", "convert", back, source=str(pipeline), heads=None)
    check_same(official, back)
    errors = []
    for planes in PLANES:
        packed = folder / f"{planes}.safetensors"
        result = _task(f"pack, planes {planes}", "pack", packed, source=str(official), heads=heads, planes=planes)
        errors.append(result.relative_error or math.nan)
        yield result
        yield _task(f"sample, planes {planes}", "sample", None, path=str(packed), steps=steps,
                    guidance_scale=guidance_scale)  # fmt: skip
    if not errors[0] > errors[-1]:
        raise BenchError(f"packed with {PLANES} planes, the network is off by {errors}: more planes must come closer")


def _task(name: str, task: str, target: Path | None, **arguments: Any) -> TaskResult:
    if target is not None:
        arguments["target"] = str(target)
    started = time.perf_counter()
    figures = run_child(task, arguments, "bench.convert_child")
    seconds = time.perf_counter() - started
    return TaskResult(name, seconds, file_bytes=None if target is None else _size(target), **figures)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def check_same(first: Path, second: Path) -> None:
    """Let two official files pass that hold the same tensors.

    Raises:
        BenchError: they do not.
    """
    one, other = state_dict_in(load_pickle(first)), state_dict_in(load_pickle(second))
    if one.keys() != other.keys():
        raise BenchError(f"tensors of {first.name} and {second.name} are not the same")
    for key, tensor in one.items():
        if tensor.dtype != other[key].dtype or not torch.equal(tensor, other[key]):
            raise BenchError(f"{key} of {second.name} is not that of {first.name}")


def show(results: list[TaskResult], console: Console) -> None:
    table = Table("task", "seconds", "peak memory", "without mapped files", "written", "off", title="one process each")
    for each in results:
        off = "" if each.relative_error is None else f"{each.relative_error:.1%}"
        sizes = map(_megabytes, (each.peak_bytes, each.private_peak_bytes, each.file_bytes))
        table.add_row(each.name, f"{each.seconds:.1f}", *sizes, off)
    console.print(table, "there and back: the same tensors; what was drawn is finite", sep="\n")


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


@reported
def main(
    name: Annotated[str, typer.Option("--preset", help="Shape of the random weights, such as DiT-XL/2.")],
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of the image that is drawn.")] = 20,
    guidance_scale: Annotated[float, typer.Option(min=0, max=20, help="Of that image; 1 is none.")] = 1.5,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time conversions of random weights, and take the peak memory of each."""
    try:
        config = preset(name)
    except ValueError as error:
        raise UserError(f"--preset: {error}") from error
    with TemporaryDirectory(prefix="robuq-bench-") as folder:
        results = list(measure(config, Path(folder), steps, guidance_scale))
    show(results, Console())
    if out is not None:
        report = {"machine": machine(), "preset": name, "model": config.model_dump(mode="json"), "steps": steps,
                  "guidance_scale": guidance_scale, "tasks": [asdict(each) for each in results]}  # fmt: skip
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
