"""A report for people: tables on a terminal, or the same ones in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from robuq_core.bench.report import CaseTiming, Loading, MemoryUse, Report
from robuq_core.bench.timing import BASELINE

_MIB = 2**20


@dataclass(frozen=True)
class _Grid:
    """Rows of equal length; ``sections``: where a group of rows ends."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sections: frozenset[int] = frozenset()


def print_report(report: Report, console: Console) -> None:
    """The machine, the tables that have rows, and what is absent with its reason."""
    for line in _machine_lines(report):
        console.print(line, highlight=False)
    for grid in _grids(report):
        table = Table(*grid.header, title=grid.title)
        for i, row in enumerate(grid.rows):
            table.add_row(*row, end_section=i in grid.sections)
        console.print(table)
    for line in _absences(report.cases):
        console.print(f"[dim]absent: {line}[/dim]", highlight=False)


def as_markdown(report: Report) -> str:
    """What :func:`print_report` prints, for a document."""
    parts = ["\n".join(_machine_lines(report))]
    for grid in _grids(report):
        lines = [f"**{grid.title}**", "", _markdown_row(grid.header), _markdown_row("---" for _ in grid.header)]
        parts.append("\n".join([*lines, *(_markdown_row(row) for row in grid.rows)]))
    if absences := _absences(report.cases):
        parts.append("\n".join(["Absent:", "", *(f"- {line}" for line in absences)]))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def summary(result: CaseTiming | MemoryUse | Loading) -> str:
    """One line of progress."""
    if isinstance(result, MemoryUse):
        return f"memory {result.model} batch {result.batch} {result.side}: {result.over_idle_bytes / _MIB:.0f} MiB"
    if isinstance(result, Loading):
        return f"loading {result.model}: ready after {result.ready_s:.2f} s"
    times = ", ".join(f"{side.name} {side.median_s * 1e3:.3g} ms" for side in result.sides)
    return f"{result.level} {result.case} batch {result.batch}: {times}"


def _machine_lines(report: Report) -> list[str]:
    machine, ceilings = report.machine, report.ceilings
    return [
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['packages'].get('torch')}, "
        f"load average before {machine['load_average']}, {report.created}",
        f"torch's FP32 product of 1024 x 1024 x 1024: {ceilings.fp32_macs_per_s / 1e9:.0f} GMAC/s; "
        f"copying memory: {ceilings.copied_bytes_per_s / 1e9:.1f} GB/s read and as much written",
    ]


def _grids(report: Report) -> list[_Grid]:
    grids = [_timings(report.cases), _memory(report.memory), _loading(report.loading)]
    return [grid for grid in grids if grid.rows]


def _timings(cases: Sequence[CaseTiming]) -> _Grid:
    rows: list[Sequence[str]] = []
    ends = []
    for case in cases:
        for i, side in enumerate(case.sides):
            rows.append(
                (
                    *((case.level, case.case, str(case.batch)) if i == 0 else ("", "", "")),
                    side.name,
                    f"{side.median_s * 1e3:.3g}",
                    f"{side.p25_s * 1e3:.3g}..{side.p75_s * 1e3:.3g}",
                    "" if side.speedup is None else f"{side.speedup:.2f}",
                    "" if side.part else f"{case.macs / side.median_s / 1e9:.0f}",
                    f"{side.relative_error:.1e}",
                )
            )
        ends.append(len(rows) - 1)
    header = ("level", "case", "batch", "side", "ms", "quartiles", "x fp32", "GMAC/s", "error")
    return _Grid("time, medians of turns", header, rows, frozenset(ends))


def _memory(uses: Sequence[MemoryUse]) -> _Grid:
    baseline = {(use.model, use.batch): use.over_idle_bytes for use in uses if use.side == BASELINE}
    rows = []
    for use in uses:
        fp32 = baseline.get((use.model, use.batch))
        ratio = "" if fp32 is None else f"{fp32 / use.over_idle_bytes:.2f}"
        sizes = (f"{use.idle_bytes / _MIB:.0f}", f"{use.over_idle_bytes / _MIB:.0f}")
        rows.append((use.model, str(use.batch), use.side, *sizes, ratio))
    header = ("model", "batch", "side", "idle MiB", "peak over idle MiB", "fp32 / this")
    return _Grid("peak memory of sampling, a fresh process each", header, rows)


def _loading(loads: Sequence[Loading]) -> _Grid:
    header = ("model", "file MB", "import s", "load s", "ready s", "first step s", "first image s")
    rows = []
    for load in loads:
        seconds = (load.import_s, load.load_s, load.ready_s, load.first_step_s, load.first_image_s)
        times = ("" if value is None else f"{value:.2f}" for value in seconds)
        rows.append((load.model, f"{load.file_bytes / 1e6:.1f}", *times))
    return _Grid("a fresh process, from its start", header, rows)


def _absences(cases: Sequence[CaseTiming]) -> list[str]:
    """Who is absent, and on which levels, by reason."""
    levels: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for absent in case.absent:
            seen = levels.setdefault((absent.reason, absent.name), [])
            if case.level not in seen:
                seen.append(case.level)
    grouped: dict[str, list[str]] = {}
    for (reason, name), where in levels.items():
        grouped.setdefault(reason, []).append(f"{name} ({', '.join(where)})")
    return [f"{', '.join(names)}: {reason}" for reason, names in grouped.items()]
