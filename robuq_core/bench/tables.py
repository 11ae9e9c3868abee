"""A report for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from robuq_core.bench.report import CaseTiming, Loading, MemoryUse, Report
from robuq_core.bench.timing import BASELINE

_MIB = 2**20


def print_report(report: Report, console: Console) -> None:
    """One table of timings, then memory, loading, and what is absent with its reason."""
    machine = report.machine
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['packages'].get('torch')}, "
                  f"load average before {machine['load_average']}", highlight=False)  # fmt: skip
    if report.cases:
        console.print(_timings(report.cases))
    if report.memory:
        console.print(_memory(report.memory))
    if report.loading:
        console.print(_loading(report.loading))
    for reason, names in _absences(report.cases).items():
        console.print(f"[dim]absent: {', '.join(names)}: {reason}[/dim]", highlight=False)


def summary(result: CaseTiming | MemoryUse | Loading) -> str:
    """One line of progress."""
    if isinstance(result, MemoryUse):
        return f"memory {result.model} batch {result.batch} {result.side}: {result.over_idle_bytes / _MIB:.0f} MiB"
    if isinstance(result, Loading):
        return f"loading {result.model}: ready after {result.ready_s:.2f} s"
    times = ", ".join(f"{side.name} {side.median_s * 1e3:.3g} ms" for side in result.sides)
    return f"{result.level} {result.case} batch {result.batch}: {times}"


def _timings(cases: tuple[CaseTiming, ...]) -> Table:
    table = Table("level", "case", "batch", "side", "ms", "quartiles", "x fp32", "GMAC/s", "error")
    for case in cases:
        for i, side in enumerate(case.sides):
            first = (case.level, case.case, str(case.batch)) if i == 0 else ("", "", "")
            table.add_row(
                *first,
                side.name,
                f"{side.median_s * 1e3:.3g}",
                f"{side.p25_s * 1e3:.3g}..{side.p75_s * 1e3:.3g}",
                "" if side.speedup is None else f"{side.speedup:.2f}",
                "" if side.part else f"{case.macs / side.median_s / 1e9:.0f}",
                f"{side.relative_error:.1e}",
                end_section=i == len(case.sides) - 1,
            )
    return table


def _memory(uses: tuple[MemoryUse, ...]) -> Table:
    table = Table("model", "batch", "side", "idle MiB", "peak over idle MiB", "fp32 / this", title="peak memory")
    baseline = {(use.model, use.batch): use.over_idle_bytes for use in uses if use.side == BASELINE}
    for use in uses:
        fp32 = baseline.get((use.model, use.batch))
        table.add_row(
            use.model,
            str(use.batch),
            use.side,
            f"{use.idle_bytes / _MIB:.0f}",
            f"{use.over_idle_bytes / _MIB:.0f}",
            "" if fp32 is None else f"{fp32 / use.over_idle_bytes:.2f}",
        )
    return table


def _loading(loads: tuple[Loading, ...]) -> Table:
    table = Table("model", "file MB", "import s", "load s", "ready s", "first step s", "first image s",
                  title="a fresh process")  # fmt: skip
    for load in loads:
        image = "" if load.first_image_s is None else f"{load.first_image_s:.2f}"
        table.add_row(
            load.model,
            f"{load.file_bytes / 1e6:.1f}",
            *(f"{seconds:.2f}" for seconds in (load.import_s, load.load_s, load.ready_s, load.first_step_s)),
            image,
        )
    return table


def _absences(cases: tuple[CaseTiming, ...]) -> dict[str, list[str]]:
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
    return grouped
