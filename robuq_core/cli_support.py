"""Shared by the console scripts: errors as one line with exit code 2, options from fields, and options of packing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Optional, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from robuq_core import params
from robuq_core.config import DecoderKind, Flavour, GuidanceScale, PredictionType, QuantConfig, SamplerName, Steps
from robuq_core.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def _bounds(limits: Iterable[Any]) -> dict[str, Any]:
    """Bounds in pydantic's metadata by the names that typer uses."""
    found: dict[str, Any] = {}
    for limit in limits:
        found |= {"min": limit.ge} if hasattr(limit, "ge") else {}
        found |= {"max": limit.le} if hasattr(limit, "le") else {}
    return found


def _bounds_of(kind: Any) -> dict[str, Any]:
    """Bounds of an annotated type."""
    return _bounds(limit for info in get_args(kind)[1:] for limit in getattr(info, "metadata", ()))


def _quant(field: str, help: str) -> Any:
    """An option with the bounds of a field of :class:`QuantConfig`."""
    return typer.Option(**_bounds(QuantConfig.model_fields[field].metadata), help=help)


StepsOption = Annotated[
    int | None, typer.Option(**_bounds_of(Steps), help="Denoising steps; default: the checkpoint's.")
]
ScaleOption = Annotated[
    float | None, typer.Option(**_bounds_of(GuidanceScale), help="Guidance scale; 1 is none, and costs half.")
]
SamplerOption = Annotated[SamplerName | None, typer.Option(help="Default: the checkpoint's.")]
PlanesOption = Annotated[
    int | None, _quant("weight_planes", "Ternary matrices summed to one weight, 1.6 bits each; default: 3.")
]
ActivationBitsOption = Annotated[
    int | None, _quant("activation_bits", "Activation bits of the packed model; default: 8.")
]
RankOption = Annotated[int | None, _quant("rank", "Rank of the low-rank branch, by SVD; default: 16.")]
HeadsOption = Annotated[int | None, typer.Option(min=1, help="Attention heads, if the file leaves them open.")]
PredictionOption = Annotated[
    PredictionType | None,
    typer.Option(help="What the network predicts, if the file does not say: epsilon (DiT), flow (SiT, REPA)."),
]
ClassesOption = Annotated[
    int | None, typer.Option(min=0, help="Classes of the network without the null class, if the file does not say.")
]
FlavourOption = Annotated[Flavour | None, typer.Option(help="Whose numerics to run with; default: the source's.")]
DecoderKindOption = Annotated[
    DecoderKind | None,
    typer.Option(help="What the network outputs; default: pixels with one or three channels, latent with more."),
]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with the message of a :class:`UserError`, ``ValueError`` or ``OSError`` and exit code 2."""

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
    """Give a command an option for each field of :class:`ImageParams` except those to leave out.

    The command's last parameter, ``params``, holds the fields; typer sees the options instead.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = {name: field for name, field in params.ImageParams.model_fields.items() if name not in leave_out}

        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            fields = {name: options.pop(name) for name in known}
            command(**options, params=params.read_params(params.ImageParams, fields))

        hints = get_type_hints(command, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        shown = [
            parameter.replace(annotation=hints[name], kind=keyword)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "params"
        ]
        shown += [
            inspect.Parameter(name, keyword, default=None, annotation=_option(field)) for name, field in known.items()
        ]
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
