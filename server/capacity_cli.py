"""``robuq-serve capacity``: how many replicas a rate of images needs, and how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robuq_core.cli_support import reported
from robuq_core.errors import UserError

if TYPE_CHECKING:
    from server.capacity import Memory, Plan


@reported
def capacity(
    rate: Annotated[float, typer.Option(help="Images per second to come, at the busiest time that matters.")],
    images_per_second: Annotated[
        float | None, typer.Option(help="What one replica draws when it always has a full batch.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Find that out here, in about --seconds.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Packed checkpoint; the bundled one if not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Of an image; default: the checkpoint's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, max=20, help="1 takes half the work; default: the checkpoint's.")
    ] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="As robuq-serve takes it.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of --measure; as robuq-serve takes it.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of --measure; as robuq-serve takes it.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of a replica's capacity to plan with.")] = 0.7,
    spare: Annotated[int, typer.Option(help="Replicas that may be lost before that share is exceeded.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 5.0,
) -> None:
    """Plan replicas and memory for a rate of images; docs/deployment.md has the formula."""
    if measure == (images_per_second is not None):
        raise UserError("give --images-per-second X, or --measure to find it out here, one of the two")
    if not measure and (backend is not None or threads is not None):
        raise UserError("--backend and --threads belong to --measure; leave them out with --images-per-second")
    # Imported here: --help and a wrong option need no torch.
    import psutil

    import robuq_core.pipeline  # noqa: F401  (what a worker holds besides its model)
    from robuq_core.checkpoint import read_header
    from robuq_core.hub import resolve_checkpoint
    from robuq_core.pipeline import Sampler
    from server.capacity import measure_rows_per_s, plan_replicas, replica_memory, rows_per_image
    from server.settings import load_settings

    plan_replicas(rate, images_per_second or 1.0, utilisation=utilisation, spare=spare)  # before anything slow
    settings = load_settings(
        {
            "checkpoint": checkpoint,
            "max_batch_rows": max_batch_rows,
            "backend": backend,
            "threads": threads,
            "replicas": 1,
        }
    )
    path = resolve_checkpoint(settings.checkpoint)
    header = read_header(path)
    steps = steps or header.sampler.steps
    guidance = header.sampler.guidance_scale if guidance_scale is None else guidance_scale
    memory = replica_memory(header, settings.max_batch_rows, psutil.Process().memory_info().rss)
    how = "given"
    if images_per_second is None:
        sampler = Sampler.from_checkpoint(
            path, decoder=settings.decoder, backend=settings.backend, threads=settings.threads
        )
        rows_per_s = measure_rows_per_s(
            sampler, settings.max_batch_rows, steps=steps, guidance_scale=guidance, seconds=seconds
        )
        images_per_second = rows_per_s / (steps * rows_per_image(guidance))
        how = f"measured here on {sampler.backend_name}: {rows_per_s:.4g} rows/s"
    plan = plan_replicas(rate, images_per_second, utilisation=utilisation, spare=spare)
    work = f"{steps} steps, guidance {guidance:g} ({rows_per_image(guidance)} row(s) a step)"
    for name, text in _lines(plan, memory, work, how, settings.max_batch_rows):
        typer.echo(f"{name:<13}{text}")
    if header.decoder == "latent":
        typer.echo("             and the latent decoder, which neither figure holds")


def _lines(plan: Plan, memory: Memory, work: str, how: str, rows: int) -> list[tuple[str, str]]:
    """Names and values of the answer."""
    of_them = f", {plan.spare} of them spare" if plan.spare else ""
    lost = f" ({plan.busy_without_spare:.0%} with {plan.spare} lost)" if plan.spare else ""
    parts = f"weights {_size(memory.weights)}, a batch of {rows} rows {_size(memory.activations)}, modulations "
    parts += f"{_size(memory.conditioning)}, the rest of the process {_size(memory.process)}"
    return [
        ("wanted", f"{plan.rate:g} images/s of {work}"),
        ("a replica", f"{plan.per_replica:.4g} images/s with full batches ({how})"),
        ("replicas", f"{plan.replicas}{of_them}"),
        ("busy", f"{plan.busy:.0%}{lost}, planned for at most {plan.utilisation:.0%}"),
        ("an image", f"takes {plan.slowdown:.2g} times as long as on an idle server, on average"),
        ("memory", f"{_size(memory.total)} a replica, {_size(plan.replicas * memory.total)} together: {parts}"),
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
