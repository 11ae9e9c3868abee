"""``POST /generate``: one validated body in, one request through the pool, images out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Self

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from robuq_core.config import NUM_TRAIN_TIMESTEPS, SamplerName, samplers_of
from robuq_core.images import IMAGE_FORMATS, ImageFormat
from robuq_core.params import ImageParams, choice_error, read_params
from server.cache import idempotent_seed
from server.errors import ApiError, invalid
from server.request import MAX_PRIORITY, MIN_TIMEOUT_S, Event, ModelInfo, Request, Result, Timings
from server.service import (
    COMPLETED,
    EVENT_STREAM,
    JSON,
    PARTIAL_IMAGE,
    STEP,
    Parts,
    Service,
    classes_of,
    documented_images,
    headers_of,
    json_parts,
)

_EXAMPLE: dict[str, Any] = {"class_id": 207}


class QueuedParams(ImageParams):
    """What to generate, when, and whether to stream: the fields of every body in JSON."""

    priority: Annotated[
        int, Field(ge=0, le=MAX_PRIORITY, description="The higher the sooner, among the requests of one API key.")
    ] = 0
    timeout_s: Annotated[
        float | None,
        Field(ge=MIN_TIMEOUT_S, description="Seconds until the request fails with 504; default: the server's limit."),
    ] = None
    stream: Annotated[bool, Field(description="Answer with server-sent events while the images are generated.")] = False


class GenerateBody(QueuedParams):
    """What to generate, and how to answer. The class is needed where the model has classes."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    format: Annotated[ImageFormat, Field(description="File format of the images.")] = "png"
    preview_every: Annotated[
        int,
        Field(
            ge=0,
            le=NUM_TRAIN_TIMESTEPS,
            description="With stream: a preview of each image every this number of steps; 0 for none.",
        ),
    ] = 0

    @model_validator(mode="after")
    def _previews_are_streamed(self) -> Self:
        if self.preview_every and not self.stream:
            raise choice_error("preview_every", "preview_every needs stream: true")
        return self


class GeneratedWith(BaseModel):
    """All that is needed to generate the images of an answer again."""

    seed: int
    class_id: int | None = Field(description="null where the model has no classes.")
    class_name: str
    steps: int
    guidance_scale: float
    guidance_interval: list[int]
    cache_interval: int
    sampler: SamplerName


class GenerateResponse(GeneratedWith):
    """Images and all that is needed to generate them again."""

    images: list[str] = Field(description="Files in base64, in order of their seeds.")
    format: ImageFormat
    timings: Timings


def generate_schema(model: ModelInfo, max_timeout_s: float) -> dict[str, Any]:
    schema = GenerateBody.model_json_schema()
    properties = schema["properties"]
    properties["sampler"]["anyOf"][0]["enum"] = list(samplers_of(model.prediction_type))
    properties["class_id"]["anyOf"][0]["maximum"] = model.valid_classes - 1
    properties["timeout_s"]["anyOf"][0]["maximum"] = max_timeout_s
    return schema


def check_choices(model: ModelInfo, sampler: SamplerName | None, guidance_scale: float | None) -> None:
    """Refuse with 422 what ``model`` cannot run, by the name of the field."""
    allowed = samplers_of(model.prediction_type)
    if sampler is not None and sampler not in allowed:
        raise invalid("sampler", f"sampler must be one of {', '.join(allowed)} with this model")
    if guidance_scale not in (None, 1) and not model.can_guide:
        raise invalid("guidance_scale", "guidance_scale must be 1: this model does not support guidance")


def make_request(
    service: Service,
    http: HttpRequest,
    model: ModelInfo,
    params: QueuedParams,
    class_id: int,
    *,
    image_format: ImageFormat,
    as_base64: bool = True,
) -> Request:
    """A request for images of one class; what ``params`` leaves open takes the model's default, the seed that of the
    ``Idempotency-Key``, or a random one."""
    check_choices(model, params.sampler, params.guidance_scale)
    key_seed = idempotent_seed(http)
    resolved = params.resolved(model.defaults, key_seed)
    assert resolved.seed is not None
    return Request(
        model,
        resolved.specs(class_id),
        seed=resolved.seed,
        image_format=image_format,
        as_base64=as_base64,
        priority=params.priority,
        timeout_s=service.timeout(params.timeout_s),
        repeatable=params.seed is not None or key_seed is not None,
    )


def answer_fields(request: Request, result: Result | None = None) -> dict[str, Any]:
    """The fields of :class:`GenerateResponse` but its images."""
    shared = {name: value for name, value in vars(request.specs[0]).items() if name not in ("class_id", "seed")}
    return {
        "seed": request.seed,
        "class_id": request.class_id,
        "class_name": request.class_name,
        **shared,
        "format": request.image_format,
        **({} if result is None else {"timings": vars(result.timings)}),
    }


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


def choose_media_type(accept: str, offered: Sequence[str]) -> str | None:
    """The offered type that ``accept`` likes best, the earlier offer on a tie; None for none (RFC 9110, 12.5.1).

    An empty header accepts everything. The most specific range decides on a type: ``image/png;q=0, image/*`` takes
    any image but PNG.
    """
    if not accept.strip():
        return offered[0]
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        media_range, *parameters = part.split(";")
        name = media_range.strip().lower()
        ranges["image/jpeg" if name == "image/jpg" else name] = _quality(parameters)
    best, best_key = None, (0.0, 0)
    for media_type in offered:
        for specificity, media_range in ((3, media_type), (2, media_type.split("/")[0] + "/*"), (1, "*/*")):
            if media_range in ranges:
                # Quality first; among equals, a type that is named outright beats one that a wildcard lets through.
                key = (ranges[media_range], specificity)
                if key[0] > 0 and key > best_key:
                    best, best_key = media_type, key
                break
    return best


def _choose_answer(http: HttpRequest, body: GenerateBody) -> tuple[str, ImageFormat]:
    """Media type of the answer and format of the images: ``Accept`` and ``format`` must not contradict each other."""
    accept = ",".join(http.headers.getlist("accept"))
    if body.stream:
        # The events carry JSON, so a client that asked for JSON gets what it can read.
        if choose_media_type(accept, [EVENT_STREAM, JSON]) is None:
            raise ApiError(406, "not_acceptable", "with stream, Accept must allow text/event-stream")
        return EVENT_STREAM, body.format
    formats: list[ImageFormat] = [body.format, *(name for name in IMAGE_FORMATS if name != body.format)]
    media_type = choose_media_type(accept, [JSON, *(f"image/{name}" for name in formats)])
    if media_type is None:
        raise ApiError(406, "not_acceptable", "Accept must allow application/json, image/png, image/jpeg or image/webp")
    if media_type == JSON:
        return JSON, body.format
    if body.num_images > 1:
        raise invalid("num_images", "num_images must be 1 for a raw image; Accept: application/json takes up to 16")
    image_format = next(name for name in formats if media_type == f"image/{name}")
    if "format" in body.model_fields_set and image_format != body.format:
        raise invalid("format", f"format {body.format} contradicts Accept: {media_type}; leave one of them out")
    return media_type, image_format


def _progress(request: Request, event: Event) -> tuple[str, bytes]:
    """An event of ``POST /generate``; the fields are in its description."""
    fields: dict[str, Any] = {"image": event.image, "steps_done": event.steps_done, "steps": event.steps}
    if not event.preview:
        return STEP, to_json({"type": STEP, **fields})
    fields["partial_image_index"] = event.steps_done // request.preview_every - 1
    fields["format"] = request.image_format
    return PARTIAL_IMAGE, to_json({"type": PARTIAL_IMAGE, **fields, "b64_json": event.preview.decode()})


def _completed(request: Request, result: Result) -> Iterable[tuple[str, bytes]]:
    fields = {"type": COMPLETED, **answer_fields(request, result)}
    yield COMPLETED, b"".join(json_parts("images", result.images, fields))


def generate_router(service: Service) -> APIRouter:
    router = APIRouter()
    schema = lru_cache(maxsize=2)(partial(generate_schema, max_timeout_s=service.settings.request_timeout_s))
    service.body_schemas["/generate"] = schema
    raw = {f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in IMAGE_FORMATS}
    about = "The images; a raw file if Accept asks for one, events if stream is true."
    responses = documented_images(about, GenerateResponse, raw, 406, 413, 422, 429, 500, 503, 504)

    @router.post("/generate", responses=responses)
    async def generate(http: HttpRequest) -> Response:
        """Generate images of one class. Send `Accept: image/png` (jpeg, webp) to get one image as a file.

        With `"stream": true` the answer is `text/event-stream`. Each event's data is a JSON object whose `type` repeats
        the event's name. `image` counts the images of the request from 0; a comment line comes every 10 s.

        - `image_generation.step`: `image`, `steps_done`, `steps`. A slow reader gets the latest of each image only.
        - `image_generation.partial_image`, after every `preview_every` steps: `image`, `steps_done`, `steps`,
          `partial_image_index` (from 0; the latest wins here, too), `format`, `b64_json` (a whole image file of what
          the model expects by now).
        - `image_generation.completed`, the last one: all fields of the JSON answer, `images` in base64.
        - `error`, the last one, too: `{"error": {"code", "message"}}` as in any other answer. What fails before the
          first event is a plain HTTP error.

        Closing the connection cancels the request.
        """
        model = service.model_to_run()
        body = read_params(GenerateBody, await http.body(), lambda: schema(model), _EXAMPLE)
        media_type, image_format = _choose_answer(http, body)
        request = make_request(
            service,
            http,
            model,
            body,
            classes_of(model).of_request(body.class_id, body.class_name),
            image_format=image_format,
            as_base64=media_type in (JSON, EVENT_STREAM),
        )
        request.watched, request.preview_every = body.stream, body.preview_every
        if body.stream:
            return await service.stream(http, request, partial(_progress, request), partial(_completed, request))
        result = await service.result(http, request)
        headers = headers_of(request, result.timings)
        if media_type != JSON:
            return Response(result.images[0], media_type=media_type, headers=headers)
        return Parts(json_parts("images", result.images, answer_fields(request, result)), JSON, headers)

    return router
