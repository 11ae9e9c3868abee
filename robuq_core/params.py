"""The fields of an image request: type, default, range and description of each, defined once. Imports no torch.

HTTP bodies, ``robuq sample``, :meth:`Sampler.generate`, the OpenAI API and the load test take their fields from
:class:`ImageParams`: a field added here appears in all of them. :class:`RowSpec` is one image of a request.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from robuq_core.config import (
    MAX_CLASSES,
    MAX_SEED,
    NUM_TRAIN_TIMESTEPS,
    GuidanceScale,
    SamplerConfig,
    SamplerName,
    Steps,
    image_seed,
)
from robuq_core.errors import UserError

MAX_IMAGES = 16
# The largest integer that JavaScript, and JSON readers based on it, keep exactly.
MAX_REQUEST_SEED = 2**53 - 1
ALL_TIMESTEPS = (0, NUM_TRAIN_TIMESTEPS - 1)
_CHOICE = "choice"  # type of the errors of choice_error

Model = TypeVar("Model", bound=BaseModel)
Timestep = Annotated[int, Field(ge=0, le=NUM_TRAIN_TIMESTEPS - 1, strict=True)]


class ParamError(UserError, ValueError):
    """An invalid field; ``field`` is its name, or ``body`` if the whole is not an object."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class RowSpec:
    """One image to generate; the fields are those of :class:`ImageParams` with all defaults filled in.

    ``seed`` 0..2**32-1; ``guidance_scale`` 1 is no guidance and costs half; ``guidance_interval`` includes both ends
    (arXiv 2404.07724); ``cache_interval``: see :mod:`robuq_core.rows`.
    """

    class_id: int
    seed: int
    steps: int
    guidance_scale: float
    sampler: SamplerName
    guidance_interval: tuple[int, int] = ALL_TIMESTEPS
    cache_interval: int = 1


class NullMeansAbsent(BaseModel):
    """Base of request bodies: ``null`` for an optional field means that it is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or None not in data.values():
            return data
        # Required and unknown fields keep their null, so that errors name them.
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                outer = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}
        return schema


class ImageParams(NullMeansAbsent):
    """What to generate. A class is required if the model has classes; None takes the checkpoint's default."""

    class_id: int | None = Field(
        None, ge=0, le=MAX_CLASSES - 1, description="Class to generate; at most num_classes - 1 of /info."
    )
    class_name: str | None = Field(
        None, min_length=1, max_length=200, description="Class by name instead, ignoring case; _ matches a space."
    )
    num_images: int = Field(
        1, ge=1, le=MAX_IMAGES, description="Images to generate; image i has the seed (seed + i) mod 2**32."
    )
    seed: int | None = Field(
        None,
        ge=-1,
        le=MAX_REQUEST_SEED,
        description="Random if absent or -1. The response repeats it; the noise depends on seed mod 2**32.",
    )
    steps: Steps | None = Field(None, description="Denoising steps; default: the checkpoint's.")
    guidance_scale: GuidanceScale | None = Field(
        None, description="Classifier-free guidance; 1 is none, and costs half. Default: the checkpoint's."
    )
    guidance_interval: tuple[Timestep, Timestep] = Field(
        ALL_TIMESTEPS,
        strict=False,  # accepts a list
        description="Lowest and highest timestep with guidance (arXiv 2404.07724); the other steps cost half.",
    )
    cache_interval: int = Field(
        1,
        ge=1,
        le=NUM_TRAIN_TIMESTEPS,
        description="Run the blocks at the first, the last and every n-th step; reuse their result between. "
        "1: at every step.",
    )
    sampler: SamplerName | None = Field(None, description="Default: the checkpoint's.")

    @field_validator("seed")
    @classmethod
    def _minus_one_is_random(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.class_id is not None and self.class_name is not None:
            raise choice_error("class_id", "give class_id or class_name, not both")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise choice_error("guidance_interval", "guidance_interval must be two timesteps, the lower one first")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def resolved(self, defaults: SamplerConfig, seed: int | None = None) -> Self:
        """A copy with the checkpoint's defaults and ``seed``, or a random one, filled in."""
        found = {name: getattr(defaults, name) for name in SamplerConfig.model_fields if getattr(self, name) is None}
        if self.seed is None:
            found["seed"] = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
        return self.model_copy(update=found) if found else self

    def spec(self, class_id: int, image: int) -> RowSpec:
        """Image number ``image`` of resolved parameters, with the class that ``class_id`` or ``class_name`` means."""
        assert self.seed is not None
        shared = {name: getattr(self, name) for name in _SHARED}
        return RowSpec(class_id=class_id, seed=image_seed(self.seed, image), **shared)

    def specs(self, class_id: int) -> tuple[RowSpec, ...]:
        """All images; see :meth:`spec`."""
        return tuple(self.spec(class_id, i) for i in range(self.num_images))


_SHARED = tuple(field.name for field in fields(RowSpec) if field.name not in ("class_id", "seed"))


def check_spec(spec: RowSpec) -> None:
    """Check the ranges of all fields but the class, whose bound is the model's.

    Raises:
        ParamError: names the field.
    """
    if not 0 <= spec.seed <= MAX_SEED:
        raise ParamError("seed", f"seed must be an integer from 0 to {MAX_SEED}, not {spec.seed}")
    read_params(ImageParams, vars(spec))


def choice_error(field: str, message: str) -> PydanticCustomError:
    """What a validator raises for an error of several fields together; reported for ``field``."""
    return PydanticCustomError(_CHOICE, message, {"field": field})


def read_params(
    model: type[Model],
    data: bytes | Mapping[str, Any],
    schema: Callable[[], Mapping[str, Any]] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Model:
    """``data`` as a ``model``: JSON bytes with strict types, a mapping with Python's conversions.

    Args:
        schema: returns the JSON schema whose ranges errors state, if the loaded checkpoint narrows the model's own.
        example: an object to show in the error if ``data`` is not an object.

    Raises:
        ParamError: names the first invalid field and its allowed values.
    """
    try:
        if isinstance(data, bytes):
            return model.model_validate_json(data.removeprefix(b"\xef\xbb\xbf"))
        return model.model_validate(data, strict=False)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    found = (schema or model.model_json_schema)()
    properties = found["properties"]
    if fault["type"] == _CHOICE:
        raise ParamError(fault["ctx"]["field"], fault["msg"])
    if not fault["loc"]:
        shown = "" if example is None else f", such as {json.dumps(example)}"
        raise ParamError("body", f"the body must be a JSON object{shown}")
    field = str(fault["loc"][0])
    if field not in properties:
        name = field if len(field) <= 64 else field[:64] + "..."
        raise ParamError(name, f"unknown field {name!a}; allowed are {', '.join(properties)}")
    allowed = allowed_values(properties[field], found.get("$defs", {}))
    if fault["type"] == "missing":
        raise ParamError(field, f"{field} is missing; it must be {allowed}")
    raise ParamError(field, f"{field} must be {allowed}")


def allowed_values(field: Mapping[str, Any], definitions: Mapping[str, Any] | None = None) -> str:
    """The JSON schema of a field in words, such as "an integer from 1 to 16"."""
    if "anyOf" in field:
        kinds = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
        return " or ".join(allowed_values(kind, definitions) for kind in kinds)
    if "$ref" in field:
        return allowed_values((definitions or {})[field["$ref"].rsplit("/", 1)[1]], definitions)
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return "one of " + ", ".join(field["enum"])
    match field.get("type"):
        case "string":
            most = f" to {field['maxLength']}" if "maxLength" in field else " or more"
            return f"a string of {field.get('minLength', 0)}{most} characters"
        case "boolean":
            return "true or false"
        case "array":
            item = field["prefixItems"][0] if "prefixItems" in field else field["items"]
            return f"a list of {field['minItems']}, each {allowed_values(item, definitions)}"
        case "integer" | "number" as kind:
            least = f" from {field['minimum']:g}" if "minimum" in field else ""
            most = f" to {field['maximum']}" if "maximum" in field else " on" if least else ""
            return ("an integer" if kind == "integer" else "a number") + least + most
    return "an object"
