"""What the answers of the routes that draw have in common: headers of answers, and their description in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from server.api.generation import Generation
from server.api.idempotency import REPLAYED_HEADER
from server.api.schemas import ErrorResponse
from server.engine import Timings

_HEADERS = {
    "X-Request-Id": "The client's id for this request, or one that the server made.",
    "x-queue-time": "Seconds until the first step.",
    "x-inference-time": "Seconds of the steps.",
    "x-total-time": "Seconds in all.",
    "X-Seed": "The seed of the first image.",
    REPLAYED_HEADER: "true if this Idempotency-Key has been answered before and this is that answer.",
}
_ERRORS = {
    400: "`invalid_request`: a field is missing, unknown or out of range",
    401: "`unauthorized`: no API key, or one that is not known",
    403: "`forbidden`: the key lacks the scope; under /admin `admin_closed`: the server has no keys",
    404: "`not_found`, `model_not_found`",
    406: "`not_acceptable`: Accept names no type that is offered",
    409: "`idempotency_conflict`: the Idempotency-Key came with another body before; `swap_in_progress`",
    413: "`body_too_large`",
    422: "`invalid_request`: a field is missing, unknown or out of range; `checkpoint_unusable`",
    429: "`queue_full`; `rate_limited`: the key's limit; Retry-After tells when to come back",
    500: "`generation_failed`, `internal_error`",
    503: "`not_ready`, `draining`: starting, stalled or draining",
    504: "`deadline_exceeded`: not done within the time limit",
}


def result_headers(generation: Generation, timings: Timings) -> dict[str, str]:
    """Headers of an answer with images; times in seconds."""
    return {
        **stream_headers(generation),
        "x-queue-time": f"{timings.queue_s:.6f}",
        "x-inference-time": f"{timings.inference_s:.6f}",
        "x-total-time": f"{timings.total_s:.6f}",
    }


def stream_headers(generation: Generation) -> dict[str, str]:
    """What is known before the images are."""
    headers = {"X-Seed": str(generation.order.seed)}
    if generation.replayed:
        headers[REPLAYED_HEADER] = "true"
    return headers


def documented_headers() -> dict[str, Any]:
    """OpenAPI's description of the headers of an answer with images."""
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}


def documented(*statuses: int, model: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of errors by status, each with its stable codes, in the shape of ``model``."""
    return {status: {"description": _ERRORS[status], "model": model} for status in (401, 403, *statuses)}
