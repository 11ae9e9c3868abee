"""What any request may look like, and the headers of every answer that browsers obey.

The limits are far above what any client of these routes sends. Heads that never end, and connections that send
nothing, do not get this far: ``server.api.connection`` ends them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError
from server.settings import Settings, split_host

# What orchestrators and load balancers ask, without a key and under any name.
PROBE_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})

MAX_TARGET_BYTES = 4096
MAX_HEADERS = 100
MAX_HEAD_BYTES = 16_384
# For the whole body from its first byte on: the largest that is allowed takes 26 kbit/s.
BODY_TIMEOUT_S = 20.0

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
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-Id", "traceparent"],
    "expose_headers": [
        *("X-Request-Id", "X-Seed", "x-queue-time", "x-inference-time", "x-total-time"),
        *("Retry-After", "RateLimit", "RateLimit-Policy", "Idempotency-Replayed", "traceresponse"),
    ],
    "max_age": 3600,
}


def body_too_large(max_body_bytes: int) -> ApiError:
    """The 413 of a body that is longer than the server takes."""
    return ApiError(413, "body_too_large", f"the body may have at most {max_body_bytes} bytes")


def check_site(scope: Scope, settings: Settings) -> None:
    """Refuse what a page of another site makes a browser send: under a name of its own that leads here (DNS rebinding),
    or without asking first (a form, or text by fetch).

    CORS only keeps such a page from reading the answer; an open server would still generate images for it.

    Raises:
        ApiError: 403.
    """
    headers = Headers(scope=scope)
    host, origin = headers.get("host"), headers.get("origin", "").strip()
    if host is not None and not settings.accepts_host(host):
        raise ApiError(403, "foreign_host", "this server is not called by this Host; see --allowed-hosts")
    if scope["method"] in ("GET", "HEAD", "OPTIONS") or {origin, "*"} & set(settings.cors_origins):
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


def check_head(scope: Scope, max_body_bytes: int) -> None:
    """Refuse a request by its first line and headers, before a byte of its body is read.

    Raises:
        ApiError: 413, 414 or 431.
    """
    if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise ApiError(414, "uri_too_long", f"the path and query may have at most {MAX_TARGET_BYTES} bytes")
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        message = f"at most {MAX_HEADERS} headers of {MAX_HEAD_BYTES} bytes together are taken"
        raise ApiError(431, "headers_too_large", message)
    length = Headers(scope=scope).get("content-length", "")
    if length.isdecimal() and int(length[:18]) > max_body_bytes:
        raise body_too_large(max_body_bytes)


class RequestLimits:
    """Refuses heads and bodies that are too large, slow bodies, foreign hosts and pages of other sites."""

    def __init__(self, app: ASGIApp, settings: Settings, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
        self.app = app
        self.settings = settings
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.body_timeout_s
        body_bytes = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal body_bytes, complete
            if complete:  # what comes now is the disconnect, for which routes wait as long as they like
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"the body was not received within {self.body_timeout_s:g} s"
                raise ApiError(408, "body_timeout", text, headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                body_bytes += len(message.get("body", b""))
                if body_bytes > self.settings.max_body_bytes:
                    raise body_too_large(self.settings.max_body_bytes)
                complete = not message.get("more_body", False)
            return message

        try:
            check_head(scope, self.settings.max_body_bytes)
            if scope["path"] not in PROBE_PATHS:
                check_site(scope, self.settings)
        except ApiError as error:
            await error.response(scope["path"])(scope, limited_receive, send)
        else:
            await self.app(scope, limited_receive, send)
