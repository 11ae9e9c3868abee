"""Around every request: its id, its log line, headers for browsers, and a plain 500 for what nobody caught."""

from __future__ import annotations

import logging
import random
import re
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import client_of
from server.api.errors import ApiError
from server.api.security import SECURITY_HEADERS
from server.logs import current_request_id, current_trace_id
from server.telemetry import Telemetry
from server.tracing import TraceContext, from_traceparent

logger = logging.getLogger("server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SECURITY_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
MAX_LOGGED_PATH = 256
# Probes and scrapes come every few seconds and say nothing when they succeed.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


def _shown(client: tuple[str, int] | None) -> str:
    """An address and, if known, its port."""
    if client is None:
        return "-"
    host = client[0][:64]
    return f"[{host}]:{client[1]}" if ":" in host else f"{host}:{client[1]}" if client[1] else host


class RequestContext:
    """Plain ASGI, since a wrapper that buffers would hide the client's disconnect from the routes."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry | None = None) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        peer = _shown(scope.get("client"))  # a middleware within replaces it by what a trusted proxy says
        asked = Headers(scope=scope)
        request_id = asked.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"  # unique, not secret: uuid4 costs a system call
        trace = self._trace_of(asked)
        token = current_request_id.set(request_id)
        trace_token = current_trace_id.set("" if trace is None else trace.trace_id)
        status = 0

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                headers.append((b"x-request-id", request_id.encode()))
                if trace is not None:
                    headers.append((b"traceresponse", trace.traceresponse.encode()))
                given = {name for name, _ in headers}
                headers.extend(header for header in _SECURITY_HEADERS if header[0] not in given)
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, labelled_send)
        except Exception:
            logger.exception("unhandled error")
            if status:
                raise  # half an answer is out; all that is left is to close the connection
            error = ApiError(500, "internal_error", "internal error; the server's log has it under this X-Request-Id")
            await error.response(scope["path"])(scope, receive, labelled_send)
        finally:
            # As it was sent: an encoded line break must not begin a line of a text log.
            path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")[:MAX_LOGGED_PATH]
            quiet = scope["path"] in _QUIET_PATHS and status < 500
            forwarded = _shown(scope.get("client"))
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %s %d",
                peer if forwarded == peer else f"{forwarded} by {peer}",
                scope["method"],
                path,
                status,
                extra={
                    "peer": peer,
                    **({"forwarded_for": forwarded} if forwarded != peer else {}),
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "duration_s": round(time.perf_counter() - began, 6),
                    **({"client": client} if (client := client_of(scope)) else {}),
                },
            )
            current_request_id.reset(token)
            current_trace_id.reset(trace_token)

    def _trace_of(self, headers: Headers) -> TraceContext | None:
        recorded = None if self.telemetry is None else self.telemetry.current()
        return recorded or from_traceparent(headers.get("traceparent", ""))
