"""``robuq-serve capacity``: how many replicas a rate of images needs, and the memory of one. See docs/deployment.md."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from robuq_core.cli_support import reported
from robuq_core.config import rows_of
from robuq_core.errors import UserError
from server.settings import TARGET_UTILISATION, load_settings

_MIN_STEPS = 3


def replicas_for(rate: float, per_replica: float, utilisation: float = TARGET_UTILISATION) -> int:
    """``ceil(rate / (utilisation * per_replica))``.

    Args:
        rate: images per second at the busiest time. per_replica: images per second of one saturated replica.

    Raises:
        UserError: a number out of range.
    """
    for name, value in (("--rate", rate), ("--images-per-second", per_replica)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} must be a positive number of images per second, not {value:g}")
    if not 0 < utilisation < 1:
        raise UserError(f"--utilisation must be between 0 and 1, such as {TARGET_UTILISATION}, not {utilisation:g}")
    needed = rate / (utilisation * per_replica)
    return max(1, math.ceil(needed - 1e-9 * needed))  # a rate that fits exactly needs no more for a rounding error


def measure_rows_per_s(
    sampler: Any, max_batch_rows: int, *, steps: int, guidance_scale: float, seconds: float = 5.0
) -> float:
    """Rows of the model per second that ``sampler`` advances in this process when it always has a full batch.

    Decoding and encoding are included; HTTP, the network and the way to a worker are not. At least three steps are
    measured, however long they take.
    """
    from robuq_core.images import encode_image
    from robuq_core.params import RowSpec

    rows = rows_of(guidance_scale)
    images, seeds = max(1, max_batch_rows // rows), itertools.count()
    batch: list[Any] = []

    def step() -> None:
        for row in [row for row in batch if row.done]:
            encode_image(sampler.decode(row), "png")
            batch.remove(row)
        while len(batch) < images:
            spec = RowSpec(0, next(seeds), steps, guidance_scale, sampler.defaults.sampler)
            batch.append(sampler.start(spec))
        sampler.step(batch)

    step()  # pays for what is set up once
    began = time.perf_counter()
    taken = 0
    while time.perf_counter() - began < seconds or taken < _MIN_STEPS:
        step()
        taken += 1
    return taken * images * rows / (time.perf_counter() - began)


@reported
def capacity(
    rate: Annotated[float, typer.Option(help="Images per second at the busiest time.")],
    images_per_second: Annotated[
        float | None, typer.Option(help="What one replica generates with full batches; default: measured here.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Packed checkpoint; default: the bundled one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Of an image; default: the checkpoint's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, max=20, help="1 takes half the work; default: the checkpoint's.")
    ] = None,
    max_batch_rows: Annotated[int | None, typer.Option(help="As of robuq-serve.")] = None,
    backend: Annotated[str | None, typer.Option(help="As of robuq-serve.")] = None,
    threads: Annotated[int | None, typer.Option(help="As of robuq-serve.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of a replica's capacity to plan with.")] = 0.7,
    spare: Annotated[int, typer.Option(min=0, help="Replicas that may be lost before that share is exceeded.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 5.0,
) -> None:
    """Plan replicas for a rate of images; measures this machine unless --images-per-second is given."""
    replicas_for(rate, 1.0 if images_per_second is None else images_per_second, utilisation)  # before anything slow
    settings = load_settings(
        {"checkpoint": checkpoint, "max_batch_rows": max_batch_rows, "backend": backend, "threads": threads}
    )
    # Imported here: --help and a wrong option need no torch.
    import psutil

    from robuq_core.checkpoint import read_header
    from robuq_core.hub import resolve_checkpoint
    from robuq_core.pipeline import Sampler

    path = resolve_checkpoint(settings.checkpoint)
    defaults = read_header(path).sampler
    steps = steps or defaults.steps
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    rows = rows_of(guidance)
    how, memory = "given", {}
    if images_per_second is None:
        sampler = Sampler.from_checkpoint(
            path, decoder=settings.decoder, backend=settings.backend, threads=settings.threads
        )
        rows_per_s = measure_rows_per_s(
            sampler, settings.max_batch_rows, steps=steps, guidance_scale=guidance, seconds=seconds
        )
        images_per_second = rows_per_s / (steps * rows)
        how = f"measured here on {sampler.backend_name}: {rows_per_s:.4g} rows/s"
        resident = psutil.Process().memory_info().rss / 1e6
        memory = {"memory": f"{resident:.0f} MB a replica, weights and a full batch included"}
    needed = replicas_for(rate, images_per_second, utilisation)
    busy = rate / ((needed + spare) * images_per_second)
    lost = f" ({rate / (needed * images_per_second):.0%} with {spare} lost)" if spare else ""
    lines = {
        "wanted": f"{rate:g} images/s of {steps} steps, guidance {guidance:g}, {rows} row(s) a step",
        "a replica": f"{images_per_second:.4g} images/s with full batches ({how})",
        "replicas": f"{needed + spare}" + (f", {spare} of them spare" if spare else ""),
        "busy": f"{busy:.0%}{lost}, planned for at most {utilisation:.0%}",
        # 1 / (1 - rho): processor sharing under Poisson arrivals, whatever the sizes of the requests.
        "an image": f"takes {1 / (1 - busy):.2g} times as long as on an idle server, on average",
        **memory,
    }
    for name, text in lines.items():
        typer.echo(f"{name:<13}{text}")
