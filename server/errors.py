"""Every answer that is not a success: ``{"error": {"code", "message", "field"?}}``, never a stack trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from robuq_core.params import ParamError
from server.request import EngineError, GenerationFailed, NotReady, Overloaded

NOT_READY_RETRY_S = 2
# Not in any standard, but what proxies write when the client disconnected; it is seen in logs only.
CLIENT_CLOSED_REQUEST = 499
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ApiError(Exception):
    """An answer other than success, raised anywhere in a route. ``code`` is stable, ``field`` names what to change."""

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
        self.status, self.code, self.message, self.field = status, code, message, field
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> bytes:
        """The answer's JSON; under /v1 with the fields that OpenAI's clients read."""
        error: dict[str, str | None] = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        if path.startswith("/v1/"):
            error["type"] = "server_error" if self.status >= 500 else "invalid_request_error"
            error["param"] = self.field
        return json.dumps({"error": error}).encode()  # ASCII: no text of a client can make the answer unencodable

    def response(self, path: str = "") -> Response:
        # OpenAI's clients know 400 for what is wrong with a body.
        status = 400 if self.status == 422 and path.startswith("/v1/") else self.status
        return Response(self.body(path), status, headers=self.headers, media_type="application/json")


def invalid(field: str, message: str) -> ApiError:
    return ApiError(422, "invalid_request", message, field=field)


def closed_by_client() -> ApiError:
    """What the log shows of a client that disconnected."""
    return ApiError(CLIENT_CLOSED_REQUEST, "client_closed_request", "the client closed the connection")


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to what routes and the pool raise; None for a bug."""
    match error:
        case ApiError():
            return error
        case ParamError():
            return invalid(error.field, str(error))
        case Overloaded():
            seconds = max(1, math.ceil(error.retry_after_s))
            message = f"the queue is full; try again in {seconds} s"
            return ApiError(429, "queue_full", message, headers={"Retry-After": str(seconds)})
        case NotReady():
            code = "draining" if error.status in ("draining", "stopped") else "not_ready"
            wait = {"Retry-After": str(NOT_READY_RETRY_S)}
            return ApiError(503, code, f"the server is {error.status}; try again", headers=wait)
        case GenerationFailed():
            return ApiError(500, "generation_failed", str(error))
        case ClientDisconnect():
            return closed_by_client()
    return None


def install_error_handlers(app: FastAPI) -> None:
    """Give ``app`` the one error shape. :class:`server.middleware.RequestContext` answers what no handler knows."""

    async def answer(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        if known is None:
            raise error
        return known.response(request.url.path)

    for kind in (ApiError, ParamError, EngineError, ClientDisconnect):
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
