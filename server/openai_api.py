"""``POST /v1/images/generations`` and ``GET /v1/models``: OpenAI's shapes, so that its clients generate images here."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, Literal, Self

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from robuq_core.images import ImageFormat
from robuq_core.params import MAX_IMAGES, choice_error, read_params
from server.classes import ClassIndex
from server.errors import ApiError, invalid
from server.generate import GeneratedWith, QueuedParams, answer_fields, make_request
from server.request import Event, ModelInfo, Request, Result
from server.service import (
    COMPLETED,
    JSON,
    PARTIAL_IMAGE,
    Parts,
    Service,
    classes_of,
    documented,
    documented_images,
    headers_of,
)

PATH = "/v1/images/generations"
_EXAMPLE: dict[str, Any] = {"prompt": "golden retriever"}
# Its clients expect the field; nothing is counted in tokens here.
_NO_TOKENS: dict[str, Any] = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0) | {
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}
}
_MAX_NAMED = 8


class ImagesBody(QueuedParams):
    """OpenAI's fields, and those of ``POST /generate`` (``extra_body`` of its clients). Others are ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_EXAMPLE]})

    prompt: str = Field(min_length=1, max_length=1000, description="Name or id of a class; see /classes.")
    model: str | None = Field(None, max_length=256, description="The id of /v1/models, or nothing.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Images to generate; 1 if not given.")
    size: str | None = Field(None, description="The model has one size.")
    response_format: Literal["b64_json"] = Field(
        "b64_json", description="Images are in the answer; none is stored for a URL."
    )
    output_format: ImageFormat = Field("png", description="File format.")
    partial_images: int = Field(0, ge=0, le=3, description="With stream: previews of each image, evenly spaced.")
    background: Literal["auto", "opaque"] = Field("auto", description="Images are opaque.")

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.n is not None and "num_images" in self.model_fields_set:
            raise choice_error("n", "give n or num_images, not both")
        return self


class ImageData(BaseModel):
    """One image; ``revised_prompt`` is the name of its class, ``seed`` is ours."""

    b64_json: str
    revised_prompt: str | None
    seed: int


class ImagesResponse(GeneratedWith):
    """``created`` in seconds since 1970; the last fields, as of ``POST /generate``, are ours."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str


def size_of(model: ModelInfo) -> str:
    return f"{model.image_size}x{model.image_size}"


def images_schema(model: ModelInfo, max_timeout_s: float) -> dict[str, Any]:
    schema = ImagesBody.model_json_schema()
    properties = schema["properties"]
    properties["size"]["anyOf"][0]["enum"] = ["auto", size_of(model)]
    properties["model"]["anyOf"][0]["examples"] = [model.name]
    properties["timeout_s"]["anyOf"][0]["maximum"] = max_timeout_s
    return schema


def check_model(name: str | None, model: ModelInfo) -> None:
    """Raise the 404 of a model that is not the one served."""
    if name and name != model.name:
        raise ApiError(404, "model_not_found", f"model must be {model.name}, the only one here", field="model")


def class_of(body: ImagesBody, classes: ClassIndex) -> int:
    """The class that ``prompt`` names, or its number; a class whose name is a number wins over that number. Our own
    fields for a class win over the prompt, which clients must send."""
    if body.class_id is not None or body.class_name is not None:
        return classes.of_request(body.class_id, body.class_name)
    if not classes.num_classes:
        return 0  # there is nothing to choose
    number = body.prompt.strip()
    if number.isascii() and number.isdigit() and len(number) < 9 and not classes.has_name(number):
        if int(number) >= classes.num_classes:
            raise invalid("prompt", f"prompt must be a class name, or an id from 0 to {classes.num_classes - 1}")
        return int(number)
    return classes.by_name(body.prompt, "prompt", "give one of these ids as the prompt")


def warning_of(body: ImagesBody) -> dict[str, str]:
    """The header that names fields which nothing depends on; none if there are none."""
    ignored = [name if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) else "?" for name in body.model_extra or ()]
    if not ignored:
        return {}
    more = ", ..." if len(ignored) > _MAX_NAMED else ""
    return {"Warning": f'299 robuq "ignored fields: {", ".join(ignored[:_MAX_NAMED])}{more}"'}


def _answer(request: Request, result: Result) -> list[bytes]:
    """The fields of :class:`ImagesResponse`, images apart so that they need not be copied."""
    ours = answer_fields(request)
    del ours["format"]
    common = {"created": int(time.time()), "background": "opaque", "output_format": request.image_format}
    parts = [b'{"data":[']
    for i, (image, spec) in enumerate(zip(result.images, request.specs, strict=True)):
        named = to_json({"revised_prompt": request.class_name or None, "seed": spec.seed})
        parts += [b',{"b64_json":"' if i else b'{"b64_json":"', image, b'",' + named[1:]]
    return [*parts, b"]," + to_json(common | {"size": size_of(request.model)} | ours)[1:]]


def _event(request: Request, name: str, image: int, encoded: bytes, **more: Any) -> tuple[str, bytes]:
    """One of OpenAI's events; ``image`` and ``seed`` are ours."""
    fields = {
        "type": name,
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": request.image_format,
        "quality": "auto",
        "size": size_of(request.model),
        "image": image,
        "seed": request.specs[image].seed,
        **more,
    }
    return name, b'{"b64_json":"' + encoded + b'",' + to_json(fields)[1:]


def _progress(request: Request, event: Event) -> tuple[str, bytes] | None:
    if not event.preview:
        return None  # OpenAI's clients know no event of a step
    index = event.steps_done // request.preview_every - 1
    return _event(request, PARTIAL_IMAGE, event.image, event.preview, partial_image_index=index)


def _completed(request: Request, result: Result) -> Iterable[tuple[str, bytes]]:
    for i, image in enumerate(result.images):
        yield _event(request, COMPLETED, i, image, usage=_NO_TOKENS)


def openai_router(service: Service) -> APIRouter:
    router = APIRouter()
    schema = lru_cache(maxsize=2)(partial(images_schema, max_timeout_s=service.settings.request_timeout_s))
    service.body_schemas[PATH] = schema
    responses = documented_images(
        "The images, or events if stream is true.", ImagesResponse, {}, 400, 404, 413, 429, 500, 503, 504
    )

    @router.post(PATH, responses=responses)
    async def generate_images(http: HttpRequest) -> Response:
        """Generate images of the class that `prompt` names (or whose id it is), for clients made for OpenAI's API.

        Unknown fields are ignored, and named in the header `Warning`. With `"stream": true`: events
        `image_generation.partial_image` (`partial_images` of each image; a slow reader gets the latest) and one
        `image_generation.completed` for each image, with OpenAI's fields and `image`, the number of the image from 0;
        or one `error`.
        """
        model = service.model_to_run()
        body = read_params(ImagesBody, await http.body(), lambda: schema(model), _EXAMPLE)
        check_model(body.model, model)
        if body.size not in (None, "auto", size_of(model)):
            raise invalid("size", f"size must be auto or {size_of(model)}; this model has one size")
        request = make_request(
            service,
            http,
            model,
            body if body.n is None else body.model_copy(update={"num_images": body.n}),
            class_of(body, classes_of(model)),
            image_format=body.output_format,
        )
        warning = warning_of(body)
        if body.stream:
            request.watched = True
            if body.partial_images:
                # The longest stride that still gives that number of previews before the last step.
                request.preview_every = math.ceil(request.specs[0].steps / (body.partial_images + 1))
            return await service.stream(
                http, request, partial(_progress, request), partial(_completed, request), warning
            )
        result = await service.result(http, request)
        return Parts(_answer(request, result), JSON, headers_of(request, result.timings) | warning)

    @router.get("/v1/models/{name}", responses=documented(404))
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model that is served, by its id."""
        model = service.model
        check_model(name, model)
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "robuq"}

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [await retrieve_model(service.model.name)]}

    return router
