"""``POST /generate``: one validated body in, one request through the engine, images out."""

from __future__ import annotations

import base64
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
from server.api.negotiation import choose_media_type
from server.api.order import Order, make_order
from server.api.responses import documented, documented_headers, result_headers, stream_headers
from server.api.schemas import GenerateRequest, GenerateResponse
from server.api.streaming import COMPLETED, DOCUMENTED_EVENTS, EVENT_STREAM, PARTIAL_IMAGE, STEP, stream_response
from server.engine import IMAGE_FORMATS, Event, Preview, Result

JSON = "application/json"


def _choose_answer(request: Request, body: GenerateRequest) -> tuple[str, Any]:
    """Media type of the answer and format of the images: ``Accept`` and ``format`` must not contradict each other."""
    accept = ",".join(request.headers.getlist("accept"))
    if body.stream:
        # The events carry JSON, so a client that asked for JSON gets what it can read.
        if choose_media_type(accept, [EVENT_STREAM, JSON]) is None:
            raise ApiError(406, "not_acceptable", "with stream, Accept must allow text/event-stream")
        return EVENT_STREAM, body.format
    first = [body.format] + [name for name in IMAGE_FORMATS if name != body.format]
    media_type = choose_media_type(accept, [JSON, *(f"image/{name}" for name in first)])
    if media_type is None:
        raise ApiError(406, "not_acceptable", "Accept must allow application/json, image/png, image/jpeg or image/webp")
    if media_type == JSON:
        return JSON, body.format
    if body.num_images > 1:
        raise invalid("num_images", "num_images must be 1 for a raw image; Accept: application/json takes up to 16")
    image_format = media_type.removeprefix("image/")
    if "format" in body.model_fields_set and image_format != body.format:
        raise invalid("format", f"format {body.format} contradicts Accept: {media_type}; leave one of them out")
    return media_type, image_format


def _answer(order: Order, result: Result) -> dict[str, Any]:
    """The fields of :class:`GenerateResponse`."""
    spec = order.specs[0]
    return {
        "images": [base64.b64encode(image).decode() for image in result.images],
        "seed": order.seed,
        "class_id": order.class_id,
        "class_name": order.class_name,
        "steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "guidance_interval": spec.guidance_interval,
        "cache_interval": spec.cache_interval,
        "sampler": spec.sampler,
        "format": order.image_format,
        "timings": vars(result.timings),
    }


class _Narrator:
    """The events of ``POST /generate``; their fields stand in its description."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def progress(self, event: Event) -> tuple[str, Mapping[str, Any]]:
        fields: dict[str, Any] = {"image": event.image, "steps_done": event.steps_done, "steps": event.steps}
        if not isinstance(event, Preview):
            return STEP, fields
        fields["partial_image_index"] = event.steps_done // self._order.preview_every - 1
        fields["format"] = self._order.image_format
        fields["b64_json"] = base64.b64encode(event.encoded).decode()
        return PARTIAL_IMAGE, fields

    def completed(self, result: Result) -> Iterable[tuple[str, Mapping[str, Any]]]:
        yield COMPLETED, _answer(self._order, result)


def _order(body: GenerateRequest, image_format: Any, model: Model, intake: Intake) -> Order:
    low, high = body.guidance_interval
    order = make_order(
        model,
        model.classes.resolve(body.class_id, body.class_name),
        num_images=body.num_images,
        image_format=image_format,
        timeout_s=intake.timeout(body.timeout_s),
        seed=body.seed,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        guidance_interval=(low, high),
        cache_interval=body.cache_interval,
        sampler=body.sampler,
        priority=body.priority,
    )
    order.watched, order.preview_every = body.stream, body.preview_every
    return order


def generate_router(intake: Intake) -> APIRouter:
    """The route, bound to an engine."""
    router = APIRouter()
    binary = {"schema": {"type": "string", "format": "binary"}}
    responses = documented(406, 409, 413, 422, 429, 500, 503, 504) | {
        200: {
            "description": "The images; a raw file if Accept asks for one, events if stream is true.",
            "model": GenerateResponse,
            "content": {f"image/{name}": binary for name in IMAGE_FORMATS} | DOCUMENTED_EVENTS,
            "headers": documented_headers(),
        }
    }

    @router.post("/generate", responses=responses)
    async def generate(request: Request) -> Response:
        """Draw images of one class. Send `Accept: image/png` (jpeg, webp) to get one image as a file.

        With `"stream": true` the answer is `text/event-stream`. Each event's data is a JSON object whose `type` repeats
        the event's name. `image` counts the images of the request from 0; a comment line comes every 10 s.

        - `image_generation.step`: `image`, `steps_done`, `steps`. A slow reader gets the latest of each image only.
        - `image_generation.partial_image`, after every `preview_every` steps: `image`, `steps_done`, `steps`,
          `partial_image_index` (from 0; the latest wins here, too), `format`, `b64_json` (a whole image file of what
          the model expects by now).
        - `image_generation.completed`, the last one: all fields of the JSON answer, `images` in base64.
        - `error`, the last one, too: `{"error": {"code", "message"}}` as in any other answer. What fails before the
          first event is a plain HTTP error.

        Closing the connection gives the images up.
        """
        try:
            # Pydantic parses the bytes itself: strict about JSON types, and safe against any nesting or encoding.
            body = GenerateRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise from_validation(error, intake.model.schema) from None
        media_type, image_format = _choose_answer(request, body)
        generation = intake.take(
            request,
            lambda model: _order(body, image_format, model, intake),
            lambda: fingerprint("/generate", media_type, body.model_dump_json()),
        )
        if body.stream:
            return await stream_response(request, generation, _Narrator(generation.order), stream_headers(generation))
        result = await generation.wait(request)
        headers = result_headers(generation, result.timings)
        if media_type != JSON:
            return Response(result.images[0], media_type=media_type, headers=headers)
        return Response(to_json(_answer(generation.order, result)), media_type=JSON, headers=headers)

    return router
