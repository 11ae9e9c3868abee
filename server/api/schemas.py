"""Bodies of requests and answers. A request is validated here once; the upper bound of ``class_id`` is the model's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from robuq_core.config import MAX_SEED, NUM_TRAIN_TIMESTEPS, PredictionType, SamplerName, samplers_of
from server.engine.images import IMAGE_FORMATS, ImageFormat
from server.engine.model import ALL_TIMESTEPS
from server.scheduler.interface import MAX_PRIORITY
from server.settings import MAX_IMAGES

MIN_TIMEOUT_S = 0.01

Timestep = Annotated[int, Field(ge=0, le=NUM_TRAIN_TIMESTEPS - 1)]


class GenerateRequest(BaseModel):
    """What to draw. ``class_id`` or ``class_name`` is needed where the model has classes; the rest has a default."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": [{"class_id": 207}]}
    )

    class_id: Annotated[int | None, Field(ge=0, description="Class to draw; at most num_classes - 1 of /info.")] = None
    class_name: Annotated[
        str | None,
        Field(
            min_length=1, max_length=200, description="Name of the class instead, in any case; _ stands for a space."
        ),
    ] = None
    num_images: Annotated[
        int, Field(ge=1, le=MAX_IMAGES, description="Images to draw; image i has the seed (seed + i) mod 2**32.")
    ] = 1
    steps: Annotated[
        int | None, Field(ge=1, le=NUM_TRAIN_TIMESTEPS, description="Denoising steps; the checkpoint's if not given.")
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=20, allow_inf_nan=False, description="Classifier-free guidance; 1 is none."),
    ] = None
    guidance_interval: Annotated[
        list[Timestep],
        Field(
            min_length=2,
            max_length=2,
            description="Lowest and highest timestep at which guidance acts; elsewhere an image takes half the work.",
        ),
    ] = list(ALL_TIMESTEPS)
    cache_interval: Annotated[
        int,
        Field(
            ge=1,
            le=NUM_TRAIN_TIMESTEPS,
            description="Run the blocks at the first step, the last and one in so many; reuse what they added between.",
        ),
    ] = 1
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Drawn at random if not given.")] = None
    sampler: Annotated[SamplerName | None, Field(description="The checkpoint's if not given.")] = None
    format: Annotated[ImageFormat, Field(description="File format of the images.")] = "png"
    priority: Annotated[
        int, Field(ge=0, le=MAX_PRIORITY, description="The higher the sooner, among the requests of one API key.")
    ] = 0
    timeout_s: Annotated[
        float | None,
        Field(
            ge=MIN_TIMEOUT_S,
            allow_inf_nan=False,
            description="Seconds until the request is given up with 504; request_timeout_s of /info if not given.",
        ),
    ] = None
    stream: Annotated[bool, Field(description="Answer with server-sent events while the images are drawn.")] = False
    preview_every: Annotated[
        int,
        Field(
            ge=0,
            le=NUM_TRAIN_TIMESTEPS,
            description="With stream: a preview of each image after every so many steps; 0 for none.",
        ),
    ] = 0

    @model_validator(mode="after")
    def _one_class(self) -> GenerateRequest:
        if self.class_id is not None and self.class_name is not None:
            raise PydanticCustomError("class_choice", "give class_id or class_name, not both")
        if self.preview_every and not self.stream:
            raise PydanticCustomError("preview_choice", "preview_every needs stream: true")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise PydanticCustomError("interval_choice", "guidance_interval must be two timesteps, the lower one first")
        return self


class TimingsSchema(BaseModel):
    """Seconds; the first three add up to ``total_s``."""

    queue_s: float
    inference_s: float
    decode_s: float
    total_s: float


class GenerateResponse(BaseModel):
    """Images and all that is needed to draw them again."""

    images: list[str] = Field(description="Files in base64, in order of their seeds.")
    seed: int
    class_id: int | None = Field(description="null where the model has no classes.")
    class_name: str
    steps: int
    guidance_scale: float
    guidance_interval: list[int]
    cache_interval: int
    sampler: SamplerName
    format: ImageFormat
    timings: TimingsSchema


class ErrorBody(BaseModel):
    """``code`` is stable, ``message`` is for people, ``field`` names the part of the request to mend."""

    code: str
    message: str
    field: str | None = None


class ErrorResponse(BaseModel):
    """The one shape of every answer that is not a success."""

    error: ErrorBody


class StatusResponse(BaseModel):
    """State of the server: starting, ready, draining, stalled, keys_unreadable, failed or stopped."""

    status: str


class DefaultsSchema(BaseModel):
    """What a request gets that names none."""

    sampler: SamplerName
    steps: int
    guidance_scale: float


class LimitsSchema(BaseModel):
    """What the server allows."""

    max_images_per_request: int
    max_batch_rows: int
    max_queue_images: int
    request_timeout_s: float
    max_body_bytes: int


class PrioritiesSchema(BaseModel):
    """Range of ``priority``; one level weighs as much as ``ageing_s`` seconds of waiting."""

    min: int = 0
    max: int = MAX_PRIORITY
    default: int = 0
    ageing_s: float


class ClassItem(BaseModel):
    """``name`` is empty where the checkpoint knows none."""

    id: int
    name: str


class ClassesResponse(BaseModel):
    """Classes in order of rank."""

    classes: list[ClassItem]


class ReplicaSchema(BaseModel):
    """``rows`` of the model are in the next step of this copy of it, of ``row_budget`` at most."""

    rows: int
    row_budget: int
    stalled: bool


class QueueResponse(BaseModel):
    """Requests run when at least one of their images does."""

    status: str
    requests_running: int
    requests_waiting: int
    images_in_flight: int
    images_waiting: int
    images_decoding: int
    replicas: list[ReplicaSchema]


class DecoderSchema(BaseModel):
    """What turns the network's samples into pictures: `pixels`, which needs none, or the name of a latent decoder's
    folder; and the bytes of its weights, which the network's do not hold."""

    name: str
    weight_bytes: int


class InfoResponse(BaseModel):
    """The server, its model and its limits."""

    version: str
    checkpoint: str
    backend: str
    average_activation_bits: float
    weight_bytes: int
    decoder: DecoderSchema
    image_size: int
    num_classes: int = Field(description="0 where the model has no classes: requests name none.")
    prediction_type: PredictionType = Field(description="What the network predicts; flow: a velocity (SiT, REPA).")
    guidance: bool = Field(description="Whether guidance_scale may be another than 1.")
    replicas: int
    features: list[str]
    samplers: list[SamplerName]
    formats: list[ImageFormat] = list(IMAGE_FORMATS)
    defaults: DefaultsSchema
    priorities: PrioritiesSchema
    limits: LimitsSchema


def request_schema(num_classes: int, prediction_type: PredictionType, max_timeout_s: float) -> dict[str, Any]:
    """JSON schema of :class:`GenerateRequest` for a model of ``num_classes`` classes."""
    schema = GenerateRequest.model_json_schema()
    schema["properties"]["sampler"]["anyOf"][0]["enum"] = list(samplers_of(prediction_type))
    schema["properties"]["class_id"]["anyOf"][0]["maximum"] = max(0, num_classes - 1)
    schema["properties"]["timeout_s"]["anyOf"][0]["maximum"] = max_timeout_s
    return schema


def allowed_values(field_schema: dict[str, Any]) -> str:
    """One field's JSON schema in words, such as "an integer from 1 to 16"."""
    field_schema = field_schema.get("anyOf", [field_schema])[0]
    if "const" in field_schema:
        return str(field_schema["const"])
    if "enum" in field_schema:
        return "one of " + ", ".join(field_schema["enum"])
    if field_schema["type"] == "string":
        return f"a string of {field_schema.get('minLength', 0)} to {field_schema['maxLength']} characters"
    if field_schema["type"] == "boolean":
        return "true or false"
    if field_schema["type"] == "array":
        return f"a list of {field_schema['minItems']}, each {allowed_values(field_schema['items'])}"
    kind = "an integer" if field_schema["type"] == "integer" else "a number"
    return f"{kind} from {field_schema['minimum']:g} to {field_schema['maximum']}"
