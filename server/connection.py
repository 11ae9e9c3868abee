"""uvicorn's HTTP protocol with bounds on everything before and around a request: its head, framing and trailers, its
pace, its connection.

Whole heads and bodies are checked in ``server.middleware``. Here end heads and trailers that do not end, connections
that send or read nothing, connections beyond the allowed number, and bytes that are not HTTP.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.access import PROBE_PATHS
from server.errors import ApiError
from server.middleware import BODY_TIMEOUT_S, SECURITY_HEADERS
from server.settings import Settings

logger = logging.getLogger("server.access")

FIRST_REQUEST_S = 5.0
HEAD_TIMEOUT_S = 10.0
# A body that is late gets its 408 from a middleware; this ends clients that keep sending after the answer.
_BODY_GRACE_S = 5.0
# For a client to take more of an answer, once the buffers of the connection are full.
WRITE_TIMEOUT_S = 60.0
# For all of a request but its body: head, sizes of chunks, trailers. The parser keeps the field that it is reading in
# one buffer, which it copies for each packet: time and memory grow with this number, so it must be small.
MAX_OUTSIDE_BYTES = 65_536
MAX_PIPELINED = 16
# Connections beyond the allowed number that may wait at the same time for the head of a probe.
PROBE_RESERVE = 64


class _Rejected(Exception):
    """Stops the parser in the middle of a rejected request."""


def _peer_of(client: tuple[str, int] | None) -> str:
    """Whose connection it is: an IPv4 address, or the /64 of an IPv6 address, all of which one host may use."""
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


class GuardedProtocol(HttpToolsProtocol):
    """Answers in our error shape. Subclasses by :func:`guarded` share the counts of one server's connections."""

    settings: Settings
    peers: Counter[str]
    reserve: OrderedDict[GuardedProtocol, None]  # beyond the allowed number, without a whole head; the oldest first

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._peer = ""
        self._in_head = True  # or between requests
        self._outside_left = MAX_OUTSIDE_BYTES
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._peer = _peer_of(self.client)
        self.peers[self._peer] += 1
        if len(self.connections) > self.settings.max_connections or (
            self.peers[self._peer] > self.settings.max_connections_per_peer
            and not self.settings.trusts(self.client[0] if self.client else "")
        ):
            self.reserve[self] = None
            if len(self.reserve) > PROBE_RESERVE:
                self.reserve.popitem(last=False)[0]._reject(_too_many())
        self._wait(FIRST_REQUEST_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self.peers[self._peer] -= 1
        if not self.peers[self._peer]:
            del self.peers[self._peer]
        self.reserve.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            self._outside_left -= len(data)
            try:
                self.parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as upgrade:  # is not taken up: what follows is the next request
                data = data[upgrade.args[0] :]
            except httptools.HttpParserError:
                if not self.transport.is_closing():
                    self._reject(ApiError(400, "invalid_http", "this is not a valid HTTP/1.1 request"))
                return
        if self._outside_left < 0 and not self.transport.is_closing():
            text = f"at most {MAX_OUTSIDE_BYTES} bytes are accepted around the body: headers, chunk sizes, trailers"
            self._reject(ApiError(431, "headers_too_large", text))

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._in_head, self._outside_left = True, MAX_OUTSIDE_BYTES
        self._wait(HEAD_TIMEOUT_S, self._head_is_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer must never become a header (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        in_reserve = self.reserve.pop(self, False) is None
        if in_reserve and httptools.parse_url(self.url).path.decode("latin-1") not in PROBE_PATHS:
            self._reject(_too_many())
            raise _Rejected
        self._check_framing()
        super().on_headers_complete()
        _fix_answers(self.cycle, self.scope["http_version"])
        self._in_head = False
        if in_reserve:
            self.cycle.keep_alive = False
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
            raise _Rejected
        self._wait(BODY_TIMEOUT_S + _BODY_GRACE_S, self.transport.abort)

    def _check_framing(self) -> None:
        """Refuse what leaves open where a request ends or for whom it is (RFC 9112, 3.2 and 6.1)."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            self._reject(ApiError(400, "invalid_http", "a request must have exactly one Host header"))
            raise _Rejected
        if codings not in ([], [b"chunked"]):
            self._reject(ApiError(501, "unsupported_transfer_encoding", "Transfer-Encoding must be chunked or absent"))
            raise _Rejected

    def on_body(self, body: bytes) -> None:
        # What came in one piece with the request before must not count as credit.
        self._outside_left = min(MAX_OUTSIDE_BYTES, self._outside_left + len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
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
        """Do ``then`` unless the client continues its request in time; one such timer runs at a time."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None if then is None else self.loop.call_later(seconds, then)

    def _head_is_late(self) -> None:
        self._reject(ApiError(408, "head_timeout", f"the headers were not received within {HEAD_TIMEOUT_S:g} s"))

    def _reject(self, error: ApiError) -> None:
        """End the connection, with the answer ``error`` if no other answer is due first."""
        cycle, waits = self.cycle, self.cycle is not None and not self.cycle.response_complete
        if waits and (self._in_head or self.pipeline or cycle.response_started):
            self.transport.abort()  # another answer is due first, or is half sent
            return
        if self._in_head or waits:
            self._answer(error)
        self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Write a whole answer that ends the connection, and its line of the log."""
        request_id = f"{random.getrandbits(128):032x}"
        body = error.body()
        head = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name.lower()}: {value}" for name, value in {**SECURITY_HEADERS, **error.headers}.items()),
            f"x-request-id: {request_id}",
            "connection: close",
        ]
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        peer = f"{self.client[0]}:{self.client[1]}" if self.client else "-"
        extra = {"peer": peer, "status": error.status, "code": error.code, "request_id": request_id}
        logger.info("%s %s %d", peer, error.code, error.status, extra=extra)


def _fix_answers(cycle: RequestResponseCycle, http_version: str) -> None:
    """What uvicorn gets wrong in answers: it writes to connections that have just closed, which fails with uvloop, and
    sends chunks to HTTP/1.0, where a body of unknown length ends with its connection."""
    send, open_ended = cycle.send, False

    async def fixed_send(message: Any) -> None:
        nonlocal open_ended
        if cycle.transport.is_closing():
            cycle.disconnected = True
        if message["type"] == "http.response.start" and http_version == "1.0":
            open_ended = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if open_ended:
                cycle.chunked_encoding = False
        elif open_ended:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = fixed_send  # type: ignore[method-assign]


def _too_many() -> ApiError:
    return ApiError(503, "too_many_connections", "too many connections", headers={"Retry-After": "1"})


def guarded(settings: Settings) -> type[GuardedProtocol]:
    shared = {"settings": settings, "peers": Counter(), "reserve": OrderedDict()}
    return type("GuardedProtocol", (GuardedProtocol,), shared)
