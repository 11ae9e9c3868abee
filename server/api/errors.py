"""Every answer that is not a success: ``{"error": {"code", "message", "field"?}}``, never a stack trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api.schemas import allowed_values
from server.engine import GenerationFailed, NotReady, Overloaded

NOT_READY_RETRY_S = 2
# Not in any standard, but what proxies write when the client hung up; it is seen in logs only.
CLIENT_CLOSED_REQUEST = 499
# Faults of several fields together, and the one that is named.
_CHOICES = {"class_choice": "class_id", "preview_choice": "preview_every", "interval_choice": "guidance_interval"}
_EXAMPLE = {"class_id": 207}
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

    def body(self, path: str = "") -> bytes:
        """The answer's JSON, in the dialect of ``path``: the shapes of /v1 and /v2 are not ours to choose."""
        error: dict[str, str | None] = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        protocol = _protocol(path)
        if protocol == "v2":
            # The Open Inference Protocol wants a string under "error".
            return _encode({"error": error.pop("message"), **error})
        if protocol == "v1":
            error["type"] = "server_error" if self.status >= 500 else "invalid_request_error"
            error["param"] = self.field
        return _encode({"error": error})

    def response(self, path: str = "") -> Response:
        """The answer to a request for ``path``."""
        # The clients of both protocols know 400 for what is wrong with a body.
        status = 400 if self.status == 422 and _protocol(path) else self.status
        return Response(self.body(path), status, headers=self.headers, media_type="application/json")


def _protocol(path: str) -> Literal["v1", "v2"] | None:
    """Whose client asks: OpenAI's (v1), one of the Open Inference Protocol (v2), or any other."""
    first = path.split("/", 2)[1] if path.startswith("/") else ""
    return "v1" if first == "v1" else "v2" if first == "v2" else None


def _encode(body: dict[str, Any]) -> bytes:
    # json.dumps keeps to ASCII, so no text of a client can make the answer unencodable.
    return json.dumps(body).encode()


def invalid(field: str, message: str) -> ApiError:
    """422 for one field of the body."""
    return ApiError(422, "invalid_request", message, field=field)


def from_validation(error: ValidationError, schema: dict[str, Any], example: Mapping[str, Any] = _EXAMPLE) -> ApiError:
    """The first fault of a body, with the range that its field allows by the JSON ``schema`` of the body."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if fault["type"] in _CHOICES:
        return invalid(_CHOICES[fault["type"]], fault["msg"])
    if not fault["loc"]:
        return invalid("body", f"the body must be a JSON object, such as {json.dumps(example)}")
    field = str(fault["loc"][0])
    properties = schema["properties"]
    if field not in properties:
        shown = field if len(field) <= 64 else field[:64] + "..."
        return invalid(shown, f"unknown field; allowed are {', '.join(properties)}")
    if fault["type"] == "missing":
        return invalid(field, f"{field} is missing; it must be {allowed_values(properties[field])}")
    return invalid(field, f"{field} must be {allowed_values(properties[field])}")


def closed_by_client() -> ApiError:
    """What the log shows of a client that hung up."""
    return ApiError(CLIENT_CLOSED_REQUEST, "client_closed_request", "the client closed the connection")


def _overloaded(error: Overloaded) -> ApiError:
    seconds = max(1, math.ceil(error.retry_after_s))
    message = f"the queue is full; try again in {seconds} s"
    return ApiError(429, "queue_full", message, headers={"Retry-After": str(seconds)})


def _not_ready(error: NotReady) -> ApiError:
    code = "draining" if error.status in ("draining", "stopped") else "not_ready"
    return ApiError(
        503, code, f"the server is {error.status}; try again", headers={"Retry-After": str(NOT_READY_RETRY_S)}
    )


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to what the routes and the engine raise; None for what nobody foresaw."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            return _overloaded(error)
        case NotReady():
            return _not_ready(error)
        case GenerationFailed():
            return ApiError(500, "generation_failed", str(error))
        case ClientDisconnect():
            return closed_by_client()
    return None


def install_error_handlers(app: FastAPI) -> None:
    """Teach ``app`` the one error shape. What no handler knows is answered by the middleware."""

    async def answer(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        assert known is not None
        return known.response(request.url.path)

    for kind in (ApiError, Overloaded, NotReady, GenerationFailed, ClientDisconnect):
        app.add_exception_handler(kind, answer)

    @app.exception_handler(RequestValidationError)
    async def _query(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        field = str(fault["loc"][-1])
        return invalid(field, f"{field}: {fault['msg']}").response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = _HTTP_CODES.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, code, message, headers=error.headers).response(request.url.path)
