"""What the console scripts share: one line on standard error and exit code 2 for mistakes a user can mend, and the
options of packing without training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Optional, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from robuq_core import params
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


def takes_params(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of :class:`ImageParams`, but for those to leave out.

    The command's last parameter is ``params``: the fields that were given. typer sees the options instead.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = {name: field for name, field in params.ImageParams.model_fields.items() if name not in leave_out}

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            fields = {name: given.pop(name) for name in known}
            command(**given, params=params.read_params(params.ImageParams, fields))

        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "params"
        ]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(field))
            for name, field in known.items()
        ]
        shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
        wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return wrapper

    return decorate


def _option(field: FieldInfo) -> Any:
    """The typer option of a field."""
    kind, limits = field.annotation, list(field.metadata)
    for part in get_args(kind):  # of X | None
        if part is not type(None) and type(None) in get_args(kind):
            kind = part
    if get_origin(kind) is Annotated:
        kind, *nested = get_args(kind)
        limits += [limit for info in nested for limit in getattr(info, "metadata", ())]
    bounds: dict[str, Any] = {}
    for limit in limits:
        if hasattr(limit, "ge"):
            bounds["min"] = limit.ge
        if hasattr(limit, "le"):
            bounds["max"] = limit.le
    if get_origin(kind) is tuple:
        kind, bounds = tuple[int, int], {"metavar": "LOW HIGH"}
    default = "" if field.default is None else f" [default: {field.default}]"
    return Annotated[Optional[kind], typer.Option(help=f"{field.description}{default}", **bounds)]  # noqa: UP045
