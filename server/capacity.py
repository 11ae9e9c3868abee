"""``robuq-serve capacity``: how many replicas a rate of images needs. See docs/deployment.md."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from robuq_core.cli_support import reported
from robuq_core.errors import UserError
from server.settings import TARGET_UTILISATION


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


@reported
def capacity(
    rate: Annotated[float, typer.Option(help="Images per second at the busiest time.")],
    images_per_second: Annotated[
        float,
        typer.Option(help="What one replica generates with full batches; docs/deployment.md says how to measure."),
    ],
    utilisation: Annotated[
        float, typer.Option(help="Share of a replica's capacity to plan with.")
    ] = TARGET_UTILISATION,
    spare: Annotated[int, typer.Option(min=0, help="Replicas that may be lost before that share is exceeded.")] = 1,
) -> None:
    """Plan replicas for a rate of images."""
    needed = replicas_for(rate, images_per_second, utilisation)
    busy = rate / ((needed + spare) * images_per_second)
    lost = f" ({rate / (needed * images_per_second):.0%} with {spare} lost)" if spare else ""
    typer.echo(f"replicas  {needed + spare}" + (f", {spare} of them spare" if spare else ""))
    typer.echo(f"busy      {busy:.0%}{lost}, planned for at most {utilisation:.0%}")
    # 1 / (1 - rho): processor sharing under Poisson arrivals, whatever the sizes of the requests.
    typer.echo(f"an image  takes {1 / (1 - busy):.2g} times as long as on an idle server, on average")
