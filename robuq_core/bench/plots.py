"""Plots of a report, for the documentation: speed against FP32 by case, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robuq_core.bench.report import CaseTiming, Report
from robuq_core.bench.timing import BASELINE
from robuq_core.errors import UserError
from robuq_core.files import replacing

_MIB = 2**20


def write_plots(report: Report, folder: Path) -> list[Path]:
    """SVG files in ``folder``, one a level that was timed, and one of memory; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib; from a checkout: pip install '.[bench]'") from error
    written = []
    for level in dict.fromkeys(case.level for case in report.cases):
        cases = [case for case in report.cases if case.level == level]
        figure = Figure(figsize=(9, 1 + 0.35 * sum(len(case.sides) + 1 for case in cases)), layout="constrained")
        _draw_speedups(figure.add_subplot(), cases)
        written.append(_save(figure, folder / f"speed-{level}.svg"))
    if report.memory:
        figure = Figure(figsize=(9, 1 + 0.35 * len(report.memory)), layout="constrained")
        _draw_memory(figure.add_subplot(), report)
        written.append(_save(figure, folder / "memory.svg"))
    return written


def _draw_speedups(axes: Any, cases: list[CaseTiming]) -> None:
    labels, values, colours = [], [], []
    for case in cases:
        for side in case.sides:
            if side.speedup is not None and side.name != BASELINE:
                labels.append(f"{case.case}, batch {case.batch}: {side.name}")
                values.append(side.speedup)
                colours.append("tab:blue" if side.name.startswith("robuq") else "tab:grey")
    axes.barh(labels, values, color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch FP32 in the same run")
    for position, value in enumerate(values):
        axes.text(value, position, f" {value:.2f}", va="center", fontsize=8)


def _draw_memory(axes: Any, report: Report) -> None:
    labels = [f"{use.model}, batch {use.batch}: {use.side}" for use in report.memory]
    values = [use.over_idle_bytes / _MIB for use in report.memory]
    axes.barh(labels, values, color=["tab:blue" if u.side == "robuq" else "tab:grey" for u in report.memory])
    axes.invert_yaxis()
    axes.set_xlabel("peak memory over idle, MiB")
    for position, value in enumerate(values):
        axes.text(value, position, f" {value:.0f}", va="center", fontsize=8)


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    return path
