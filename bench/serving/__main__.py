"""The command: ``python -m bench.serving [MEASURE ...]``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.serving import arrivals, batching, http_costs
from bench.serving.figures import CheckFailed, Figure, Scale
from robuq_core.bench.report import machine
from robuq_core.cli_support import reported
from robuq_core.errors import UserError
from robuq_core.files import replacing

MEASURES: dict[str, Callable[[Scale], Figure]] = {
    "overhead": http_costs.overhead,
    "ceiling": http_costs.ceiling,
    "efficiency": batching.efficiency,
    "step-tax": batching.step_tax,
    "occupancy": batching.occupancy,
    "invariance": batching.invariance,
    "leak": http_costs.leak,
}
ALL = [*MEASURES, *arrivals.OTHERS]


@reported
def main(
    measures: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(ALL)}; all if none.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it work? Figures mean little.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Packed file; default: the bundled one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder for the plot of latency against load.")] = None,
) -> None:
    """Measure what serving costs, each figure with a check."""
    if checkpoint is not None:
        os.environ["ROBUQ_CHECKPOINT"] = checkpoint
    chosen, console, scale = measures or ALL, Console(), Scale(quick)
    if unknown := [name for name in chosen if name not in ALL]:
        raise UserError(f"unknown measure {unknown[0]!r}; choose from {', '.join(ALL)}")
    table = Table("measure", "result", "target", "", "checked by", show_lines=True)
    figures: list[Figure] = []
    try:
        for name in (name for name in MEASURES if name in chosen):
            console.print(f"[dim]{name} ...[/]")
            figures.append(MEASURES[name](scale))
        if others := [kind for kind in arrivals.OTHERS if kind in chosen]:
            console.print(f"[dim]Poisson arrivals: {', '.join(others)} ...[/]")
            figures += arrivals.figures(others, scale, images)
    except CheckFailed as error:
        raise UserError(f"the check failed: {error}") from error
    finally:
        for figure in figures:
            mark = "[green]met[/]" if figure.met else "[red]missed[/]"
            table.add_row(figure.measure, figure.text, figure.target, mark, figure.check)
        console.print(table)
        if out is not None and figures:
            report = {"machine": machine(), "quick": quick, "figures": [asdict(figure) for figure in figures]}
            with replacing(out) as part:
                part.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
