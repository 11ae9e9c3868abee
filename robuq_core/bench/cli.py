"""``robuq bench``: time, measure, plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robuq_core.cli_support import reported

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False)


@app.callback()
@reported
def bench(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help="Random weights of this shape, e.g. DiT-XL/2.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="Packed file, folder, bundled name or hub id."),
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="op, block, forward, image, memory or loading; repeatable; default: all.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable; default: 1 2 8 32.")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Of level op, e.g. mlp.fc2; repeatable; default: all of a block.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Compare with this one; repeatable; default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fixed choice of cases within three minutes.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Turns of each side, at most.")] = 11,
    budget_s: Annotated[float, typer.Option(min=0, help="About how long the turns of one case may take.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
    backend: Annotated[str, typer.Option(help="Kernel backend; auto takes the best that works here.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: the backend's choice.")] = None,
) -> None:
    """Time a packed network against FP32 and others, level by level, in turns, every result checked; measure its peak
    memory and its loading in fresh processes."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from robuq_core.bench.cases import QUICK_PLANS, Plan, Settings, run_plans
    from robuq_core.bench.report import as_markdown, summary, write_report

    chosen: dict[str, Any] = {"preset": preset, "checkpoint": checkpoint, "levels": level, "batches": batch}
    chosen = {key: value for key, value in (chosen | {"layers": layer, "peers": peer}).items() if value}
    if quick and chosen:
        raise ValueError("--quick chooses the cases itself: remove --preset, --checkpoint, --level, --batch, --layer "
                         "and --peer")  # fmt: skip
    plans = QUICK_PLANS if quick else (Plan(**chosen),)
    settings = Settings(backend, threads, device, 7 if quick else rounds, 10.0 if quick else budget_s)
    progress = Console(stderr=True)
    report = run_plans(plans, settings, lambda result: progress.print(summary(result), style="dim", highlight=False))
    typer.echo(as_markdown(report), nl=False)
    if out is not None:
        write_report(out, report)


@app.command()
@reported
def plot(
    report: Annotated[Path, typer.Argument(help="JSON that `robuq bench --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the SVG files.")] = Path("bench-plots"),
) -> None:
    """Draw the figures of a report: speed by level and peak memory."""
    from robuq_core.bench.report import read_report, write_plots

    for path in write_plots(read_report(report), out):
        typer.echo(path)


@app.command()
@reported
def show(report: Annotated[Path, typer.Argument(help="JSON that `robuq bench --out` wrote.")]) -> None:
    """Print the tables of a report in Markdown."""
    from robuq_core.bench.report import as_markdown, read_report

    typer.echo(as_markdown(read_report(report)), nl=False)


@app.command("random-checkpoint")
@reported
def random_checkpoint(
    preset: Annotated[str, typer.Argument(help="A shape, e.g. DiT-XL/2.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The packed file to write.")],
) -> None:
    """Write a packed file of a published shape with random weights, rank 16, and print its size."""
    from robuq_core.bench.fresh import write_random
    from robuq_core.bench.source import open_source

    size = write_random(open_source(preset, None).checkpoint, out)
    typer.echo(f"{out}: {size:,} bytes")
