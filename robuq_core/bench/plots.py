"""Plots of a report, for the documentation: speed against FP32 by case, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robuq_core.bench.report import Report
from robuq_core.bench.timing import BASELINE
from robuq_core.errors import UserError
from robuq_core.files import replacing

_MIB = 2**20


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
