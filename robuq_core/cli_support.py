"""Shared by the console scripts: errors as one line with exit code 2, options from fields, and options of packing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from robuq_core.classes import read_names
from robuq_core.config import (
    DecoderKind,
    Flavour,
    GuidanceScale,
    PredictionType,
    SamplerName,
    Steps,
    StrictModel,
)
from robuq_core.errors import UserError
from robuq_core.params import read_params

P = ParamSpec("P")
R = TypeVar("R")


class PackingOptions(StrictModel):
    """Options of the commands that pack full-precision weights; None takes the default."""

    weight_planes: int | None = Field(
        None, ge=1, le=3, description="Ternary matrices summed to one weight, 1.6 bits each [3]."
    )
    activation_bits: int | None = Field(None, ge=1, le=8, description="Activation bits of the packed model [8].")
    rank: int | None = Field(None, ge=0, le=4096, description="Rank of the low-rank branch [16].")
    heads: int | None = Field(None, ge=1, description="Attention heads, if the file does not say.")
    prediction: PredictionType | None = Field(
        None, description="What the network predicts, if the file does not say: epsilon (DiT), flow (SiT, REPA)."
    )
    classes: int | None = Field(None, ge=0, description="Classes without the null class, if the file does not say.")
    flavour: Flavour | None = Field(None, description="Whose numerics to run with; default: the source's.")
    decoder_kind: DecoderKind | None = Field(
        None, description="What the network outputs; default: pixels with one or three channels, latent with more."
    )
    steps: Steps | None = Field(None, description="Default denoising steps to store.")
    guidance_scale: GuidanceScale | None = Field(None, description="Default guidance scale to store; 1: none.")
    sampler: SamplerName | None = Field(None, description="Default sampler to store.")
    class_names: Path | None = Field(None, description="Text file with one class name per line.")

    @property
    def quant(self) -> dict[str, Any]:
        return given({name: getattr(self, name) for name in ("weight_planes", "activation_bits", "rank")})

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of :class:`SamplerConfig`."""
        return given({name: getattr(self, name) for name in ("steps", "guidance_scale", "sampler")})

    @property
    def hints(self) -> dict[str, Any]:
        """See :class:`robuq_core.models.adapters_official.Hints`."""
        return {"num_heads": self.heads, "prediction": self.prediction, "num_classes": self.classes,
                "flavour": self.flavour}  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        return () if self.class_names is None else read_names(self.class_names)


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


def takes_params(model: type[BaseModel], *skip: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of ``model`` except those to skip.

    The command's last parameter, ``params``, holds the fields; typer sees the options instead.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        known = {name: field for name, field in model.model_fields.items() if name not in skip}

        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            fields = {name: options.pop(name) for name in known}
            command(**options, params=read_params(model, given(fields)))

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
    kind, limits = field.annotation, list(field.metadata)
    for part in get_args(kind):  # of X | None
        if part is not type(None) and type(None) in get_args(kind):
            kind = part
    if get_origin(kind) is Annotated:
        kind, *infos = get_args(kind)
        limits += [limit for info in infos for limit in getattr(info, "metadata", ())]
    names = {"ge": "min", "le": "max"}
    bounds: dict[str, Any] = {names[n]: getattr(each, n) for each in limits for n in names if hasattr(each, n)}
    if get_origin(kind) is tuple:
        kind, bounds = tuple[int, int], {"metavar": "LOW HIGH"}
    default = "" if field.default is None else f" [default: {field.default}]"
    return Annotated[Optional[kind], typer.Option(help=f"{field.description}{default}", **bounds)]  # noqa: UP045
