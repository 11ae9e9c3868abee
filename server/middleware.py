"""Around every route: request id and log line, limits of head and body, foreign sites, admission by ``server.access``.

Plain ASGI: a wrapper that buffers would hide the client's disconnect from the routes. Connections, and heads that never
end, are the business of ``server.connection``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from server.access import (
    ACCESS,
    PROBE_PATHS,
    SAFE_METHODS,
    Access,
    RateLimits,
    client_of,
    is_public,
    needed_scope,
    presented_key,
)
from server.errors import ApiError
from server.keys import ApiKey, KeyStore
from server.logs import current_request_id, current_trace_id
from server.metrics import Metrics
from server.settings import Settings, split_host
from server.telemetry import trace_id_of

logger = logging.getLogger("server.access")

# Probes and scrapes come every few seconds and say nothing when they succeed.
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})

# For the whole body from its first byte on: the largest that is allowed takes 26 kbit/s.
BODY_TIMEOUT_S = 20.0
MAX_LOGGED_PATH = 256

# The page's own files only, no inline script or style; images also from what scripts have fetched or drawn.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# What scripts of the sites in cors_origins may send and read. Credentials of the browser (cookies) are never used.
_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-Id", "traceparent"],
    "expose_headers": [
        *("X-Request-Id", "X-Seed", "X-Cache", "x-queue-time", "x-inference-time", "x-total-time"),
        *("Retry-After", "Warning"),
    ],
    "max_age": 3600,
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SECURITY_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


def install(app: FastAPI, settings: Settings, metrics: Metrics, store: KeyStore | None) -> None:
    # The last one added is the outermost.
    app.add_middleware(Gate, settings=settings, store=store, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **_CORS)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(RequestContext)


class RequestContext:
    """The outermost: request id, trace, log line, headers for browsers, HEAD as GET, a plain 500 for a bug."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no other kind of connection is served; the server closes it
        began = time.perf_counter()
        method = scope["method"]
        if method == "HEAD":  # the server sends what GET's headers are, and drops the body by its own scope
            scope = {**scope, "method": "GET"}
        peer = _shown(scope.get("client"))  # a middleware within replaces it by what a trusted proxy says
        asked = Headers(scope=scope)
        request_id = asked.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"  # unique, not secret: uuid4 costs a system call
        token = current_request_id.set(request_id)
        trace_token = current_trace_id.set(trace_id_of(asked.get("traceparent", "")))
        status = 0

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Connection is the server's to say: with HTTP/1.0 it adds one.
                headers = [header for header in message.get("headers", ()) if header[0].lower() != b"connection"
                           or header[1] == b"close"]  # fmt: skip
                headers.append((b"x-request-id", request_id.encode()))
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
            error = ApiError(500, "internal_error", "internal error; see this X-Request-Id in the server's log")
            await error.response(scope["path"])(scope, receive, labelled_send)
        finally:
            # As it was sent: an encoded line break must not begin a line of a text log.
            path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")[:MAX_LOGGED_PATH]
            quiet = scope["path"] in _QUIET_PATHS and status < 500
            forwarded, client = _shown(scope.get("client")), client_of(scope)
            extra = {"peer": peer, "method": method, "path": path, "status": status}
            extra |= {"forwarded_for": forwarded} if forwarded != peer else {}
            extra |= {"client": client} if client else {}
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %s %d",
                *(peer if forwarded == peer else f"{forwarded} by {peer}", method, path, status),
                extra=extra | {"duration_s": round(time.perf_counter() - began, 6)},
            )
            current_request_id.reset(token)
            current_trace_id.reset(trace_token)


def _shown(client: tuple[str, int] | None) -> str:
    """An address and, if known, its port."""
    if client is None:
        return "-"
    host = client[0][:64]
    return f"[{host}]:{client[1]}" if ":" in host else f"{host}:{client[1]}" if client[1] else host


class Gate:
    """Refuses what no route should see: bodies that are too large or slow, foreign hosts and sites, requests without a
    key where there are keys, and keys that have used up their minute."""

    def __init__(self, app: ASGIApp, settings: Settings, store: KeyStore | None, metrics: Metrics) -> None:
        self.app, self.settings, self.store, self.metrics = app, settings, store, metrics
        self.rates = RateLimits(on_limited=metrics.rejected.labels("rate_limited").inc)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in PROBE_PATHS:
                check_site(scope["method"], headers, self.settings)
            body = _Body(headers, receive, self.settings.max_body_bytes)
            key = self._admit(scope, headers)
            if key is not None:
                scope[ACCESS] = Access(key, self.rates)
                self.rates.check(key, "requests")
                self.rates.charge(key, "requests")
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
        else:
            await self.app(scope, body.receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> ApiKey | None:
        path: str = scope["path"]
        needed = needed_scope(scope["method"], path)
        if self.store is None:
            if needed == "admin":
                raise ApiError(403, "admin_closed", "admin routes need API keys; start the server with --api-keys-file")
            return None
        if is_public(path):
            return None
        presented = presented_key(headers)
        key = self.store.find(presented) if presented else None
        if key is None:
            self.metrics.rejected.labels("unauthorized").inc()
            message = "invalid API key" if presented else "send an API key as Authorization: Bearer KEY"
            raise ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        if needed != "read" and needed not in key.scopes:
            self.metrics.rejected.labels("forbidden").inc()
            raise ApiError(403, "forbidden", f"this API key lacks the scope {needed}")
        return key


class _Body:
    """The body as routes receive it: within its time and size. Raises 413 at once if it says that it is too large."""

    def __init__(self, headers: Headers, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
        self._complete = False
        self._bytes = 0
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            message = "send the body as it is, without a Content-Encoding"
            raise ApiError(415, "unsupported_encoding", message, headers={"Accept-Encoding": "identity"})
        length = headers.get("content-length", "")
        self._check(int(length[:18]) if length.isdecimal() else 0)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(413, "body_too_large", f"the body may have at most {self._max_bytes} bytes")

    async def receive(self) -> Message:
        if self._complete:  # what comes now is the disconnect, for which routes wait as long as they like
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the body was not received within {BODY_TIMEOUT_S:g} s"
            raise ApiError(408, "body_timeout", text, headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._check(self._bytes)
            self._complete = not message.get("more_body", False)
        return message


def check_site(method: str, headers: Headers, settings: Settings) -> None:
    """Reject (403) what a page of another site makes a browser send: under a name of its own that leads here (DNS
    rebinding), or without asking first (a form, or text by fetch).

    CORS only keeps such a page from reading the answer; an open server would still generate images for it.
    """
    host, origin = headers.get("host"), headers.get("origin", "").strip()
    if host is not None and not settings.accepts_host(host):
        raise ApiError(403, "foreign_host", "this Host is not allowed; see --allowed-hosts")
    if method in SAFE_METHODS or {origin, "*"} & set(settings.cors_origins):
        return
    # No page can change Sec-Fetch-Site. Over plain http browsers do not send it, but always the Origin.
    site = headers.get("sec-fetch-site")
    if site in ("cross-site", "same-site") or (site is None and origin and not _same_site(origin, host or "")):
        raise ApiError(403, "foreign_origin", "pages of this site may not call this server; see --cors-origins")


def _same_site(origin: str, host: str) -> bool:
    """Whether a page of ``origin`` came from ``host``. A TLS proxy in front hides the scheme, so it is not compared."""
    scheme, _, netloc = origin.partition("://")
    name, port = split_host(netloc)
    ports = (80, 443, None)
    host_name, host_port = split_host(host)
    if port is None:
        port = {"http": 80, "https": 443}.get(scheme)
    return bool(name) and name == host_name and (port == host_port or (host_port is None and port in ports))
