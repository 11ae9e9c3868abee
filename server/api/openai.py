"""``POST /v1/images/generations`` and ``GET /v1/models``: OpenAI's shapes, so that its clients draw here."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError
from pydantic_core import to_json

from server.api.catalog import Model
from server.api.errors import ApiError, from_validation, invalid
from server.api.idempotency import fingerprint
from server.api.intake import Intake
from server.api.openai_schemas import (
    ImageGenerateRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    OpenAIErrorResponse,
)
from server.api.order import Order, make_order
from server.api.responses import documented, documented_headers, result_headers, stream_headers
from server.api.streaming import COMPLETED, DOCUMENTED_EVENTS, PARTIAL_IMAGE, stream_response
from server.engine import Event, Preview, Result

JSON = "application/json"
PATH = "/v1/images/generations"

# Its clients expect the field; nothing is counted in tokens here.
_NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def _order(body: ImageGenerateRequest, model: Model, intake: Intake) -> Order:
    check_model(body.model, model)
    if body.size not in (None, "auto", model.size):
        raise invalid("size", f"size must be auto or {model.size}; this model has one size")
    order = make_order(
        model,
        _class_of(body.prompt, model),
        num_images=body.n or 1,
        image_format=body.output_format or "png",
        timeout_s=intake.timeout(body.timeout_s),
        seed=body.seed,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        sampler=body.sampler,
        priority=body.priority or 0,
    )
    if body.stream:
        order.watched = True
        if body.partial_images:
            # The longest stride that still gives so many previews before the last step.
            order.preview_every = math.ceil(order.specs[0].steps / (body.partial_images + 1))
    return order


def check_model(name: str | None, model: Model) -> None:
    """Raise the 404 of a model that is not the one served."""
    if name and name != model.name:
        raise ApiError(404, "model_not_found", f"model must be {model.name}, the one that is served", field="model")


def _class_of(prompt: str, model: Model) -> int:
    """The class that ``prompt`` names, or its number; a class whose name is a number wins over that number."""
    if not model.num_classes:
        return 0  # its clients must send a prompt, and there is nothing to choose
    number = prompt.strip()
    if number.isascii() and number.isdigit() and len(number) < 9 and not model.classes.has_name(number):
        if int(number) >= model.num_classes:
            raise invalid("prompt", f"prompt must be a class name, or an id from 0 to {model.num_classes - 1}")
        return int(number)
    return model.classes.by_name(prompt, "prompt", "give one of these ids as the prompt")


def _answer(order: Order, result: Result) -> dict[str, Any]:
    """The fields of :class:`ImagesResponse`."""
    spec = order.specs[0]
    return {
        "created": int(time.time()),
        "data": [
            {
                "b64_json": base64.b64encode(image).decode(),
                "revised_prompt": order.class_name or None,
                "seed": order.specs[i].seed,
            }
            for i, image in enumerate(result.images)
        ],
        "background": "opaque",
        "output_format": order.image_format,
        "size": order.size,
        "seed": order.seed,
        "class_id": order.class_id,
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "sampler": spec.sampler,
    }


class _Narrator:
    """OpenAI's events, one ``completed`` for each image; ``image`` and ``seed`` are ours."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def _image(self, image: int, encoded: bytes) -> dict[str, Any]:
        return {
            "b64_json": base64.b64encode(encoded).decode(),
            "created_at": int(time.time()),
            "background": "opaque",
            "output_format": self._order.image_format,
            "quality": "auto",
            "size": self._order.size,
            "image": image,
            "seed": self._order.specs[image].seed,
        }

    def progress(self, event: Event) -> tuple[str, Mapping[str, Any]] | None:
        if not isinstance(event, Preview):
            return None  # OpenAI's clients know no event of a step
        index = event.steps_done // self._order.preview_every - 1
        return PARTIAL_IMAGE, {**self._image(event.image, event.encoded), "partial_image_index": index}

    def completed(self, result: Result) -> Iterable[tuple[str, Mapping[str, Any]]]:
        for i, image in enumerate(result.images):
            yield COMPLETED, {**self._image(i, image), "usage": _NO_TOKENS}


def openai_router(intake: Intake) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter()
    responses = documented(400, 404, 409, 413, 429, 500, 503, 504, model=OpenAIErrorResponse) | {
        200: {
            "description": "The images, or events if stream is true.",
            "model": ImagesResponse,
            "content": DOCUMENTED_EVENTS,
            "headers": documented_headers(),
        }
    }

    @router.post(PATH, responses=responses)
    async def generate_images(request: Request) -> Response:
        """Draw images of the class that `prompt` names (or whose id it is), for clients made for OpenAI's API.

        With `"stream": true`: events `image_generation.partial_image` (`partial_images` of each image; a slow reader
        gets the latest) and one `image_generation.completed` for each image, with OpenAI's fields and `image`, the
        number of the image from 0; or one `error`.
        """
        try:
            body = ImageGenerateRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise from_validation(error, intake.model.openai_schema, example={"prompt": "golden retriever"}) from None
        generation = intake.take(
            request,
            lambda model: _order(body, model, intake),
            lambda: fingerprint(PATH, body.model_dump_json()),
        )
        if body.stream:
            return await stream_response(request, generation, _Narrator(generation.order), stream_headers(generation))
        result = await generation.wait(request)
        headers = result_headers(generation, result.timings)
        return Response(to_json(_answer(generation.order, result)), media_type=JSON, headers=headers)

    def card(model: Model) -> ModelCard:
        return ModelCard(id=model.name, created=model.created)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[card(intake.model)])

    @router.get("/v1/models/{name}", responses=documented(404, model=OpenAIErrorResponse))
    async def retrieve_model(name: str) -> ModelCard:
        """The model that is served, by its id."""
        model = intake.model
        check_model(name, model)
        return card(model)

    return router
