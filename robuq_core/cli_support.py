"""What the console scripts share: one line on standard error and exit code 2 for mistakes a user can mend, and the
options of packing without training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Optional, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from robuq_core import params
from robuq_core.config import DecoderKind, Flavour, GuidanceScale, PredictionType, SamplerName, Steps
from robuq_core.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def _bounds(limits: Iterable[Any]) -> dict[str, Any]:
    """What typer calls the bounds among pydantic's metadata."""
    found: dict[str, Any] = {}
    for limit in limits:
        found |= {"min": limit.ge} if hasattr(limit, "ge") else {}
        found |= {"max": limit.le} if hasattr(limit, "le") else {}
    return found


def _bounds_of(kind: Any) -> dict[str, Any]:
    """The bounds of an annotated type."""
    return _bounds(limit for info in get_args(kind)[1:] for limit in getattr(info, "metadata", ()))


StepsOption = Annotated[
    int | None, typer.Option(**_bounds_of(Steps), help="Denoising steps; default: the checkpoint's.")
]
ScaleOption = Annotated[
    float | None, typer.Option(**_bounds_of(GuidanceScale), help="Guidance; 1 is none, and costs half.")
]
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


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def takes_params(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of :class:`ImageParams`, but for those to leave out.

    The command's last parameter is ``params``: the fields that were given. typer sees the options instead.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = {name: field for name, field in params.ImageParams.model_fields.items() if name not in leave_out}

        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            fields = {name: options.pop(name) for name in known}
            command(**options, params=params.read_params(params.ImageParams, fields))

        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "params"
        ]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(field))
            for name, field in known.items()
        ]
        shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return wrapper

    return decorate


def _option(field: FieldInfo) -> Any:
    """The typer option of a field."""
    kind, bounds = field.annotation, _bounds(field.metadata)
    for part in get_args(kind):  # of X | None
        if part is not type(None) and type(None) in get_args(kind):
            kind = part
    if get_origin(kind) is Annotated:
        bounds |= _bounds_of(kind)
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        kind, bounds = tuple[int, int], {"metavar": "LOW HIGH"}
    default = "" if field.default is None else f" [default: {field.default}]"
    return Annotated[Optional[kind], typer.Option(help=f"{field.description}{default}", **bounds)]  # noqa: UP045
