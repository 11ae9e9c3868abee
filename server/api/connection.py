"""uvicorn's HTTP protocol with bounds on what comes before a request is one: its head, its pace, its connection.

Everything that has a whole head is the business of ``server.api.security``. Here end heads that do not end,
connections that send nothing or read nothing, connections beyond the allowed number, and what is no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import ApiError
from server.api.security import BODY_TIMEOUT_S, MAX_HEAD_BYTES, MAX_TARGET_BYTES

HEAD_TIMEOUT_S = 10.0
# A body that is late gets its 408 from a middleware; this ends whoever goes on sending after the answer.
_BODY_GRACE_S = 5.0
# For a client to take more of an answer, once the buffers of the connection are full.
WRITE_TIMEOUT_S = 60.0
# Room for the method, the version and the separators beside what the middleware counts.
_MAX_RAW_HEAD_BYTES = MAX_HEAD_BYTES + MAX_TARGET_BYTES + 4096


def _raw_answer(error: ApiError) -> bytes:
    """A whole HTTP/1.1 answer that ends the connection."""
    body = error.body()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in error.headers.items()),
        "connection: close",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class GuardedProtocol(HttpToolsProtocol):
    """Takes uvicorn's ``limit_concurrency`` as the number of connections, and answers in our error shape."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._in_head = True
        self._head_bytes = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            self._refuse(ApiError(503, "too_many_connections", "too many connections", headers={"Retry-After": "1"}))
            return
        self._wait(self.timeout_keep_alive, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_RAW_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(ApiError(431, "headers_too_large", f"at most {MAX_HEAD_BYTES} bytes of headers are taken"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "invalid_http", "this is not a valid HTTP/1.1 request"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._wait(HEAD_TIMEOUT_S, self._head_is_late)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._wait(BODY_TIMEOUT_S + _BODY_GRACE_S, self.transport.abort)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._wait(0.0, None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _wait(self, seconds: float, then: Callable[[], None] | None) -> None:
        """Do ``then`` unless the client gets on with its request in time; one such timer runs at a time."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None if then is None else self.loop.call_later(seconds, then)

    def _head_is_late(self) -> None:
        self._refuse(ApiError(408, "head_timeout", f"the headers were not received within {HEAD_TIMEOUT_S:g} s"))

    def _refuse(self, error: ApiError) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the middle of another answer there is no place for this one
            return
        self.transport.write(_raw_answer(error))
        self.transport.close()
