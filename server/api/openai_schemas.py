"""Bodies of the routes in OpenAI's shape: its names, and ours for what it has no name for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from robuq_core.config import MAX_SEED, NUM_TRAIN_TIMESTEPS, SamplerName
from server.api.schemas import MIN_TIMEOUT_S
from server.engine.images import ImageFormat
from server.scheduler.interface import MAX_PRIORITY
from server.settings import MAX_IMAGES

Text = Annotated[str | None, Field(max_length=256)]
IGNORED = "Taken for the sake of clients that send it; nothing depends on it."


class ImageGenerateRequest(BaseModel):
    """OpenAI's fields of ``POST /v1/images/generations``; the last five are ours (``extra_body`` of its clients)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": [{"prompt": "golden retriever"}]}
    )

    prompt: Annotated[str, Field(min_length=1, max_length=1000, description="Name or id of a class; see /classes.")]
    model: Annotated[Text, Field(description="The id that /v1/models tells, or nothing.")] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_IMAGES, description="Images to draw; 1 if not given.")] = None
    size: Annotated[str | None, Field(description="The model has one size.")] = None
    response_format: Annotated[
        Literal["b64_json"] | None, Field(description="Images come in the answer; none is kept for a URL.")
    ] = None
    output_format: Annotated[ImageFormat | None, Field(description="File format; png if not given.")] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="With stream: previews of each image, evenly spaced.")
    ] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description="Images are opaque.")] = None
    quality: Annotated[Text, Field(description=IGNORED)] = None
    style: Annotated[Text, Field(description=IGNORED)] = None
    moderation: Annotated[Text, Field(description=IGNORED)] = None
    user: Annotated[Text, Field(description=IGNORED)] = None
    safety_identifier: Annotated[Text, Field(description=IGNORED)] = None

    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Drawn at random if not given.")] = None
    steps: Annotated[
        int | None, Field(ge=1, le=NUM_TRAIN_TIMESTEPS, description="Denoising steps; the checkpoint's if not given.")
    ] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0, le=20, allow_inf_nan=False, description="Classifier-free guidance; 1 is none.")
    ] = None
    sampler: Annotated[SamplerName | None, Field(description="The checkpoint's if not given.")] = None
    priority: Annotated[int | None, Field(ge=0, le=MAX_PRIORITY, description="The higher the sooner.")] = None
    timeout_s: Annotated[
        float | None, Field(ge=MIN_TIMEOUT_S, allow_inf_nan=False, description="Seconds until 504.")
    ] = None


class ImageData(BaseModel):
    """One image; ``revised_prompt`` is the name of its class, ``seed`` is ours."""

    b64_json: str
    revised_prompt: str | None
    seed: int


class ImagesResponse(BaseModel):
    """``created`` in seconds since 1970; ``seed`` (of the first image), ``steps`` and so on are ours."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    seed: int
    class_id: int | None
    steps: int
    guidance_scale: float
    sampler: SamplerName


class ModelCard(BaseModel):
    """One model; ``created`` is when the server began to serve it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["robuq"] = "robuq"


class ModelList(BaseModel):
    """The one model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class OpenAIErrorBody(BaseModel):
    """As everywhere; ``param`` repeats ``field``."""

    code: str
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    field: str | None = None


class OpenAIErrorResponse(BaseModel):
    """The shape of every answer under /v1 that is not a success."""

    error: OpenAIErrorBody


def openai_schema(name: str, size: str, max_timeout_s: float) -> dict[str, Any]:
    """JSON schema of :class:`ImageGenerateRequest` for the model ``name`` that draws ``size`` ("WxH")."""
    schema = ImageGenerateRequest.model_json_schema()
    properties = schema["properties"]
    properties["size"]["anyOf"][0]["enum"] = ["auto", size]
    properties["model"]["anyOf"][0]["examples"] = [name]
    properties["timeout_s"]["anyOf"][0]["maximum"] = max_timeout_s
    return schema
