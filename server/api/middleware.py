"""Around every request: its id, its log line, headers for browsers, and a plain 500 for what nobody caught."""

from __future__ import annotations

import logging
import random
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError
from server.api.security import SECURITY_HEADERS
from server.logging import current_request_id

logger = logging.getLogger("server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Probes and scrapes come every few seconds and say nothing when they succeed.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


class RequestContext:
    """Plain ASGI, since a wrapper that buffers would hide the client's disconnect from the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"  # unique, not secret: uuid4 costs a system call
        token = current_request_id.set(request_id)
        status = 0

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
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
            quiet = scope["path"] in _QUIET_PATHS and status < 500
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %d",
                scope["method"],
                scope["path"],
                status,
                extra={
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "duration_s": round(time.perf_counter() - began, 6),
                },
            )
            current_request_id.reset(token)
