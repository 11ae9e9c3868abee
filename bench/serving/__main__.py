"""The command: ``python -m bench.serving [MEASURE ...]``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.serving import arrivals, batching, http_costs
from bench.serving.figures import CheckFailed, Figure, Scale, show, write
from bench.serving.servers import Kind
from robuq_core.cli_support import reported
from robuq_core.errors import UserError

MEASURES: dict[str, Callable[[Scale], Figure]] = {
    "overhead": http_costs.overhead,
    "ceiling": http_costs.ceiling,
    "efficiency": batching.efficiency,
    "step-tax": batching.step_tax,
    "occupancy": batching.occupancy,
    "invariance": batching.invariance,
    "leak": http_costs.leak,
}
# These share one run: the loads are shares of one capacity, and arrivals are the same.
COMPARISONS: dict[str, Kind] = {"window": "window", "litserve": "litserve"}
ALL = [*MEASURES, *COMPARISONS]


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
    figures: list[Figure] = []
    try:
        for name in (name for name in MEASURES if name in chosen):
            console.print(f"[dim]{name} ...[/]")
            figures.append(MEASURES[name](scale))
        if others := [kind for name, kind in COMPARISONS.items() if name in chosen]:
            console.print(f"[dim]Poisson arrivals: {', '.join(others)} ...[/]")
            comparison = arrivals.compare(["continuous", *others], scale)
            figures += [arrivals.figure(comparison, other) for other in others]
            if images is not None:
                arrivals.draw(comparison, images)
    except CheckFailed as error:
        raise UserError(f"the check failed: {error}") from error
    finally:
        if figures:
            show(figures, console)
            if out is not None:
                write(figures, out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
