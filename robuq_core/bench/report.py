"""What a benchmark found and on which machine: plain data in a JSON file, its tables in Markdown, its plots.

Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import ValidationError

from robuq_core.config import StrictModel
from robuq_core.errors import UserError
from robuq_core.files import replacing

BASELINE = "fp32"
_PACKAGES = ("robuq", "torch", "triton", "torchao", "numpy", "safetensors")
_MIB = 2**20


class SideTiming(StrictModel):
    """One implementation on one case.

    ``relative_error``: of its result, at most ``tolerance``, against the reference backend (ours) or FP32 (peers).
    ``part``: it does part of the case's work. ``speedup``: median over the rounds of FP32's time over this one's of
    the same round; none for parts, and where FP32 did not run.
    """

    name: str
    median_s: float
    p25_s: float
    p75_s: float
    min_s: float
    rounds: int
    relative_error: float
    tolerance: float
    part: bool = False
    speedup: float | None = None


class Absent(StrictModel):
    """A side that was not timed, and why."""

    name: str
    reason: str


class CaseTiming(StrictModel):
    """The sides of one case. ``macs``: multiply-accumulates of the full-precision network, for work per second."""

    level: str
    case: str
    batch: int
    macs: int
    sides: tuple[SideTiming, ...]
    absent: tuple[Absent, ...] = ()


class MemoryUse(StrictModel):
    """Peak memory of a fresh process that samples, over what it held before it loaded anything."""

    model: str
    side: str
    batch: int
    idle_bytes: int
    over_idle_bytes: int


class Loading(StrictModel):
    """A fresh process from its start; medians. ``ready_s``: imports and loading, up to where the first step may begin.
    ``first_image_s``: up to the first picture, where the checkpoint draws pixels."""

    model: str
    file_bytes: int
    import_s: float
    load_s: float
    ready_s: float
    first_step_s: float
    first_image_s: float | None = None


class Report(StrictModel, extra="ignore"):
    """Fields of older reports that are gone are ignored."""

    report_version: int = 1
    created: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: tuple[CaseTiming, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    loading: tuple[Loading, ...] = ()


def machine() -> dict[str, Any]:
    """What runs here. ``load_average``, of the minute before, shows whether others used the machine."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if "model name" in line).partition(":")[2].strip()
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(psutil.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def write_report(path: Path, report: Report) -> None:
    """``report`` as JSON in ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Inverse of :func:`write_report`.

    Raises:
        UserError: no such file, or not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `robuq bench --out {path}`") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: not a benchmark report: {where}: {first['msg']}; run `robuq bench` again") from error


def summary(result: CaseTiming | MemoryUse | Loading) -> str:
    """One line of progress."""
    if isinstance(result, MemoryUse):
        return f"memory {result.model} batch {result.batch} {result.side}: {result.over_idle_bytes / _MIB:.0f} MiB"
    if isinstance(result, Loading):
        return f"loading {result.model}: ready after {result.ready_s:.2f} s"
    times = ", ".join(f"{side.name} {side.median_s * 1e3:.3g} ms" for side in result.sides)
    return f"{result.level} {result.case} batch {result.batch}: {times}"


def as_markdown(report: Report) -> str:
    """The machine, the tables that have rows, and what is absent with its reason."""
    machine = report.machine
    parts = [
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['packages'].get('torch')}, "
        f"load average before {machine['load_average']}, {report.created}",
        *_table(
            "time, medians of turns",
            ("level", "case", "batch", "side", "ms", "quartiles", "x fp32", "GMAC/s", "error"),
            [row for case in report.cases for row in _timing_rows(case)],
        ),
        *_table(
            "peak memory of sampling, a fresh process each",
            ("model", "batch", "side", "idle MiB", "peak over idle MiB", "fp32 / this"),
            _memory_rows(report.memory),
        ),
        *_table(
            "a fresh process, from its start",
            ("model", "file MB", "import s", "load s", "ready s", "first step s", "first image s"),
            [_loading_row(load) for load in report.loading],
        ),
    ]
    if absences := _absences(report.cases):
        parts.append("\n".join(["Absent:", "", *absences]))
    return "\n\n".join(parts) + "\n"


def _table(title: str, header: Sequence[str], rows: Sequence[Iterable[str]]) -> tuple[str, ...]:
    lines = (header, ["---"] * len(header), *rows)
    return (f"**{title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)) if rows else ()


def _timing_rows(case: CaseTiming) -> list[tuple[str, ...]]:
    return [
        (
            *((case.level, case.case, str(case.batch)) if i == 0 else ("", "", "")),
            side.name,
            f"{side.median_s * 1e3:.3g}",
            f"{side.p25_s * 1e3:.3g}..{side.p75_s * 1e3:.3g}",
            "" if side.speedup is None else f"{side.speedup:.2f}",
            "" if side.part else f"{case.macs / side.median_s / 1e9:.0f}",
            f"{side.relative_error:.1e}",
        )
        for i, side in enumerate(case.sides)
    ]


def _memory_rows(uses: Sequence[MemoryUse]) -> list[tuple[str, ...]]:
    baseline = {(use.model, use.batch): use.over_idle_bytes for use in uses if use.side == BASELINE}
    rows: list[tuple[str, ...]] = []
    for use in uses:
        fp32 = baseline.get((use.model, use.batch))
        ratio = "" if fp32 is None else f"{fp32 / use.over_idle_bytes:.2f}"
        sizes = (f"{use.idle_bytes / _MIB:.0f}", f"{use.over_idle_bytes / _MIB:.0f}")
        rows.append((use.model, str(use.batch), use.side, *sizes, ratio))
    return rows


def _loading_row(load: Loading) -> tuple[str, ...]:
    seconds = (load.import_s, load.load_s, load.ready_s, load.first_step_s, load.first_image_s)
    return load.model, f"{load.file_bytes / 1e6:.1f}", *("" if value is None else f"{value:.2f}" for value in seconds)


def _absences(cases: Sequence[CaseTiming]) -> list[str]:
    """A line for each side and reason, with the levels."""
    levels: dict[tuple[str, str], dict[str, None]] = {}
    for case in cases:
        for absent in case.absent:
            levels.setdefault((absent.name, absent.reason), {})[case.level] = None
    return [f"- {name} ({', '.join(where)}): {reason}" for (name, reason), where in levels.items()]


def write_plots(report: Report, folder: Path) -> list[Path]:
    """SVG files in ``folder``, one per level and one of memory; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    written = []
    for level in dict.fromkeys(case.level for case in report.cases):
        bars = [
            (f"{case.case}, batch {case.batch}", side.name, side.speedup)
            for case in report.cases
            for side in case.sides
            if case.level == level and side.speedup is not None and side.name != BASELINE
        ]
        written.append(_draw(folder / f"speed-{level}.svg", bars, "times as fast as torch FP32 in the same run", ".2f"))
    if report.memory:
        uses = [(f"{use.model}, batch {use.batch}", use.side, use.over_idle_bytes / _MIB) for use in report.memory]
        written.append(_draw(folder / "memory.svg", uses, "peak memory over idle, MiB", ".0f"))
    return written


def _draw(path: Path, bars: Sequence[tuple[str, str, float]], axis: str, number: str) -> Path:
    """``bars``: of each its case, the side, the value."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib; from a checkout: pip install '.[bench]'") from error
    figure = Figure(figsize=(9, 1 + 0.35 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:blue" if side.startswith("robuq") else "tab:grey" for _, side, _ in bars]
    drawn = axes.barh([f"{case}: {side}" for case, side, _ in bars], [value for *_, value in bars], color=colours)
    axes.bar_label(drawn, fmt=f"{{:{number}}}", padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    return path
