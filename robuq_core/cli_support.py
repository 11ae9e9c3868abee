"""What the console scripts share: one line on standard error and exit code 2 for mistakes a user can mend, and the
options of packing without training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

from robuq_core.config import DecoderKind, Flavour, PredictionType, SamplerName
from robuq_core.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

ScaleOption = Annotated[float | None, typer.Option(min=0, max=20, help="Guidance; 1 is none, and costs half.")]
SamplerOption = Annotated[SamplerName | None, typer.Option(help="Default: the checkpoint's.")]
PlanesOption = Annotated[
    int | None, typer.Option(min=1, max=3, help="Ternary matrices summed to a weight, 1.6 bits each; default: 3.")
]
ActivationBitsOption = Annotated[int | None, typer.Option(min=1, max=8, help="Of the packed model; default: 8.")]
RankOption = Annotated[int | None, typer.Option(min=0, help="Of the low-rank branch, by SVD; default: 16.")]
HeadsOption = Annotated[int | None, typer.Option(min=1, help="Attention heads, where the file leaves them open.")]
PredictionOption = Annotated[
    PredictionType | None,
    typer.Option(help="What the network predicts, where the file does not say: epsilon (DiT), flow (SiT, REPA)."),
]
ClassesOption = Annotated[
    int | None, typer.Option(min=0, help="Classes of the network, without that of none, if the file does not say.")
]
FlavourOption = Annotated[Flavour | None, typer.Option(help="Whose numerics to run with; default: the source's.")]
DecoderKindOption = Annotated[
    DecoderKind | None,
    typer.Option(help="What the model draws; default: pixels if it has one channel or three, latent if more."),
]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Let a :class:`UserError`, ``ValueError`` or ``OSError`` end a command with its message, not a traceback."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (UserError, ValueError, OSError) as error:
            typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(2) from error

    return wrapper
