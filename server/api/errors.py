"""Every answer that is not a success: ``{"error": {"code", "message", "field"?}}``, never a stack trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from server.api.schemas import allowed_values
from server.engine import GenerationFailed, NotReady, Overloaded

NOT_READY_RETRY_S = 2
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ApiError(Exception):
    """An answer other than success, raised anywhere in a route."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        error: dict[str, str] = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        # json.dumps keeps to ASCII, so no text of a client can make the answer unencodable.
        return Response(json.dumps({"error": error}), self.status, headers=self.headers, media_type="application/json")


def invalid(field: str, message: str) -> ApiError:
    """422 for one field of the body."""
    return ApiError(422, "invalid_request", message, field=field)


def from_validation(error: ValidationError, schema: dict[str, Any]) -> ApiError:
    """The first fault of a body, with the range that its field allows; ``schema`` from ``request_schema``."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if fault["type"] == "class_choice":
        return invalid("class_id", fault["msg"])
    if not fault["loc"]:
        return invalid("body", 'the body must be a JSON object, such as {"class_id": 207}')
    field = str(fault["loc"][0])
    properties = schema["properties"]
    if field not in properties:
        shown = field if len(field) <= 64 else field[:64] + "..."
        return invalid(shown, f"unknown field; allowed are {', '.join(properties)}")
    return invalid(field, f"{field} must be {allowed_values(properties[field])}")


def _overloaded(error: Overloaded) -> ApiError:
    seconds = max(1, math.ceil(error.retry_after_s))
    message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, "queue_full", message, headers={"Retry-After": str(seconds)})


def _not_ready(error: NotReady) -> ApiError:
    code = "draining" if error.status in ("draining", "stopped") else "not_ready"
    return ApiError(
        503, code, f"the server is {error.status}; try again", headers={"Retry-After": str(NOT_READY_RETRY_S)}
    )


def install_error_handlers(app: FastAPI) -> None:
    """Teach ``app`` the one error shape. What no handler knows is answered by the middleware."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(Overloaded)
    async def _overload(request: Request, error: Overloaded) -> Response:
        return _overloaded(error).response()

    @app.exception_handler(NotReady)
    async def _unready(request: Request, error: NotReady) -> Response:
        return _not_ready(error).response()

    @app.exception_handler(GenerationFailed)
    async def _failed(request: Request, error: GenerationFailed) -> Response:
        return ApiError(500, "generation_failed", str(error)).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = _HTTP_CODES.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, code, message, headers=error.headers).response()
