"""A report as Markdown tables, for a terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from robuq_core.bench.report import CaseTiming, Loading, MemoryUse, Report
from robuq_core.bench.timing import BASELINE

_MIB = 2**20


def as_markdown(report: Report) -> str:
    """The machine, the tables that have rows, and what is absent with its reason."""
    machine = report.machine
    parts = [
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['packages'].get('torch')}, "
        f"load average before {machine['load_average']}, {report.created}",
        *(_timings(report.cases) if report.cases else ()),
        *(_memory(report.memory) if report.memory else ()),
        *(_loading(report.loading) if report.loading else ()),
    ]
    if absences := _absences(report.cases):
        parts.append("\n".join(["Absent:", "", *(f"- {line}" for line in absences)]))
    return "\n\n".join(parts) + "\n"


def summary(result: CaseTiming | MemoryUse | Loading) -> str:
    """One line of progress."""
    if isinstance(result, MemoryUse):
        return f"memory {result.model} batch {result.batch} {result.side}: {result.over_idle_bytes / _MIB:.0f} MiB"
    if isinstance(result, Loading):
        return f"loading {result.model}: ready after {result.ready_s:.2f} s"
    times = ", ".join(f"{side.name} {side.median_s * 1e3:.3g} ms" for side in result.sides)
    return f"{result.level} {result.case} batch {result.batch}: {times}"


def _table(title: str, header: Sequence[str], rows: Iterable[Iterable[str]]) -> tuple[str, str]:
    lines = (header, ["---"] * len(header), *rows)
    return f"**{title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _timings(cases: Sequence[CaseTiming]) -> tuple[str, str]:
    rows = [
        (
            *((case.level, case.case, str(case.batch)) if i == 0 else ("", "", "")),
            side.name,
            f"{side.median_s * 1e3:.3g}",
            f"{side.p25_s * 1e3:.3g}..{side.p75_s * 1e3:.3g}",
            "" if side.speedup is None else f"{side.speedup:.2f}",
            "" if side.part else f"{case.macs / side.median_s / 1e9:.0f}",
            f"{side.relative_error:.1e}",
        )
        for case in cases
        for i, side in enumerate(case.sides)
    ]
    header = ("level", "case", "batch", "side", "ms", "quartiles", "x fp32", "GMAC/s", "error")
    return _table("time, medians of turns", header, rows)


def _memory(uses: Sequence[MemoryUse]) -> tuple[str, str]:
    baseline = {(use.model, use.batch): use.over_idle_bytes for use in uses if use.side == BASELINE}
    rows = []
    for use in uses:
        fp32 = baseline.get((use.model, use.batch))
        ratio = "" if fp32 is None else f"{fp32 / use.over_idle_bytes:.2f}"
        sizes = (f"{use.idle_bytes / _MIB:.0f}", f"{use.over_idle_bytes / _MIB:.0f}")
        rows.append((use.model, str(use.batch), use.side, *sizes, ratio))
    header = ("model", "batch", "side", "idle MiB", "peak over idle MiB", "fp32 / this")
    return _table("peak memory of sampling, a fresh process each", header, rows)


def _loading(loads: Sequence[Loading]) -> tuple[str, str]:
    header = ("model", "file MB", "import s", "load s", "ready s", "first step s", "first image s")
    rows = []
    for load in loads:
        seconds = (load.import_s, load.load_s, load.ready_s, load.first_step_s, load.first_image_s)
        times = ("" if value is None else f"{value:.2f}" for value in seconds)
        rows.append((load.model, f"{load.file_bytes / 1e6:.1f}", *times))
    return _table("a fresh process, from its start", header, rows)


def _absences(cases: Sequence[CaseTiming]) -> list[str]:
    """Who is absent, and on which levels, by reason."""
    levels: dict[str, dict[str, dict[str, None]]] = {}
    for case in cases:
        for absent in case.absent:
            levels.setdefault(absent.reason, {}).setdefault(absent.name, {})[case.level] = None
    lines = []
    for reason, names in levels.items():
        sides = (f"{name} ({', '.join(where)})" for name, where in names.items())
        lines.append(f"{', '.join(sides)}: {reason}")
    return lines
