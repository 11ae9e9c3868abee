"""``POST /generate``: one validated body in, one request through the engine, images out."""

from __future__ import annotations

import asyncio
import base64
import random
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from robuq_core.config import MAX_SEED, image_seed
from server.api.classes import ClassIndex
from server.api.errors import ApiError, from_validation, invalid
from server.api.negotiation import choose_media_type
from server.api.schemas import (
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    TimingsSchema,
    request_schema,
)
from server.engine import IMAGE_FORMATS, CancelReason, Engine, Result, Timings
from server.engine.model import RowSpec
from server.logging import current_request_id

# Not in any standard, but what proxies write when the client hung up; it is seen in logs only.
CLIENT_CLOSED_REQUEST = 499

JSON = "application/json"

_HEADERS = {
    "X-Request-Id": "The client's id for this request, or one that the server made.",
    "X-Seed": "The seed of the first image.",
    "x-queue-time": "Seconds until the first step.",
    "x-inference-time": "Seconds of the steps.",
    "x-total-time": "Seconds in all.",
}
_ERRORS = {
    406: "Accept names no type that is offered",
    413: "body too large",
    422: "a field is missing, unknown or out of range",
    429: "the queue is full; Retry-After tells when to come back",
    500: "the model failed on this request",
    503: "starting, stalled or draining",
    504: "not done within the server's time limit",
}


async def _client_gone(request: Request) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _run(request: Request, engine: Engine, specs: list[RowSpec], image_format: Any, timeout_s: float) -> Result:
    """Drive one request to its result; whatever ends the wait, the rows do not outlive it."""
    job = engine.submit(specs, image_format, request_id=current_request_id.get())
    result = asyncio.wrap_future(job.future)
    gone: asyncio.Future[None] = asyncio.ensure_future(_client_gone(request))
    reason: CancelReason = "cancelled"
    try:
        await asyncio.wait((result, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        if gone.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "client_closed_request", "the client closed the connection")
        reason = "timeout"
        raise ApiError(504, "deadline_exceeded", f"not done within {timeout_s:g} s")
    finally:
        gone.cancel()
        result.cancel()
        engine.cancel(job, reason)


def _choose_answer(request: Request, body: GenerateRequest) -> tuple[str, Any]:
    """Media type of the answer and format of the images: ``Accept`` and ``format`` must not contradict each other."""
    first = [body.format] + [name for name in IMAGE_FORMATS if name != body.format]
    accept = ",".join(request.headers.getlist("accept"))
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


def _timing_headers(seed: int, timings: Timings) -> dict[str, str]:
    return {
        "X-Seed": str(seed),
        "x-queue-time": f"{timings.queue_s:.6f}",
        "x-inference-time": f"{timings.inference_s:.6f}",
        "x-total-time": f"{timings.total_s:.6f}",
    }


def generate_router(engine: Engine, timeout_s: float) -> APIRouter:
    """The route, bound to an engine."""
    router = APIRouter()
    sampler = engine.sampler
    classes = ClassIndex(sampler.class_names, sampler.num_classes)
    schema = request_schema(sampler.num_classes)
    binary = {"schema": {"type": "string", "format": "binary"}}
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The images; a raw file if Accept asks for one.",
            "model": GenerateResponse,
            "content": {f"image/{name}": binary for name in IMAGE_FORMATS},
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()},
        }
    }
    responses |= {status: {"description": text, "model": ErrorResponse} for status, text in _ERRORS.items()}
    body_schema = {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}

    @router.post("/generate", responses=responses, openapi_extra=body_schema)
    async def generate(request: Request) -> Response:
        """Draw images of one class. Send `Accept: image/png` (jpeg, webp) to get one image as a file."""
        try:
            # Pydantic parses the bytes itself: strict about JSON types, and safe against any nesting or encoding.
            body = GenerateRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise from_validation(error, schema) from None
        media_type, image_format = _choose_answer(request, body)
        class_id = classes.resolve(body.class_id, body.class_name)
        defaults = sampler.defaults
        seed = random.randint(0, MAX_SEED) if body.seed is None else body.seed
        specs = [
            RowSpec(
                class_id=class_id,
                seed=image_seed(seed, i),
                steps=body.steps or defaults.steps,
                guidance_scale=defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale,
                sampler=body.sampler or defaults.sampler,
            )
            for i in range(body.num_images)
        ]
        result = await _run(request, engine, specs, image_format, timeout_s)
        headers = _timing_headers(seed, result.timings)
        if media_type != JSON:
            return Response(result.images[0], media_type=media_type, headers=headers)
        answer = GenerateResponse(
            images=[base64.b64encode(image).decode() for image in result.images],
            seed=seed,
            class_id=class_id,
            class_name=classes.name(class_id),
            steps=specs[0].steps,
            guidance_scale=specs[0].guidance_scale,
            sampler=specs[0].sampler,
            format=image_format,
            timings=TimingsSchema(**vars(result.timings)),
        )
        return Response(answer.model_dump_json(), media_type=JSON, headers=headers)

    return router
