"""Who may ask for what, decided before any route runs: API keys, their scopes, their rates.

A path that is not named here needs a key, so that a route which is added later is closed by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import keys
from server.api.errors import ApiError
from server.api.rates import RateLimits
from server.api.security import PROBE_PATHS
from server.keys import ApiKey, KeyStore
from server.metrics import Metrics

# Probes, which carry no key, and the pages, which hold nothing of the model and ask their user for a key.
PUBLIC_PATHS = PROBE_PATHS | {"/", "/docs"}
PUBLIC_FOLDER = "/web/"
_ADMIN_FOLDER = "/admin/"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_ACCESS = "robuq.access"  # in the ASGI scope


def is_public(path: str) -> bool:
    """Whether ``path`` answers without a key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def needed_scope(method: str, path: str) -> keys.Scope:
    """What a key must be allowed to do for this request."""
    if (path + "/").startswith(_ADMIN_FOLDER):
        return "admin"
    return "read" if method in _SAFE_METHODS else "generate"


def presented_key(headers: Headers) -> str | None:
    """The key of ``Authorization: Bearer KEY`` or else of ``X-API-Key: KEY``."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key", "").strip() or None  # the parser leaves blanks at the end


class _Access:
    """A key that was let in, and what its answers tell of its rates."""

    def __init__(self, key: ApiKey, rates: RateLimits, metrics: Metrics) -> None:
        self.key = key
        self.rates = rates
        self.metrics = metrics

    def check(self, unit: keys.RateUnit, cost: int = 1) -> None:
        try:
            self.rates.check(self.key, unit, cost)
        except ApiError as error:
            if error.status == 429:
                self.metrics.rejected.labels("rate_limited").inc()
            raise


def current_client(request: Request) -> str:
    """The name of the request's API key, under which it shares the server; empty on an open server."""
    return client_of(request.scope)


def client_of(scope: Scope) -> str:
    """As :func:`current_client`, of an ASGI scope; empty, too, for whoever was not let in."""
    access: _Access | None = scope.get(_ACCESS)
    return access.key.name if access else ""


@contextmanager
def image_budget(request: Request, images: int) -> Iterator[None]:
    """Count ``images`` against the request's key if the block, which queues them, ends well.

    The block must not await, or another request could use the same room.

    Raises:
        ApiError: 429 with Retry-After if the key has used up its minute, 422 if it may never draw that many.
    """
    access: _Access | None = request.scope.get(_ACCESS)
    if access is None:
        yield
        return
    access.check("images", images)
    yield
    access.rates.charge(access.key, "images", images)


class Authentication:
    """Lets requests through that may come in. Without a store the server is open, but for its admin routes."""

    def __init__(self, app: ASGIApp, store: KeyStore | None, metrics: Metrics) -> None:
        self.app = app
        self.store = store
        self.metrics = metrics
        self.rates = RateLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no other kind of connection is served; the server closes it
        try:
            access = self._admit(scope)
            if access is not None:
                scope[_ACCESS] = access
                access.check("requests")
                access.rates.charge(access.key, "requests")
                send = _telling_rates(access, send)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> _Access | None:
        path: str = scope["path"]
        needed = needed_scope(scope["method"], path)
        if self.store is None:
            if needed == "admin":
                raise ApiError(403, "admin_closed", "admin routes need API keys; start the server with --api-keys-file")
            return None
        if is_public(path):
            return None
        presented = presented_key(Headers(scope=scope))
        key = self.store.find(presented) if presented else None
        if key is None:
            self.metrics.rejected.labels("unauthorized").inc()
            message = "this API key is not known" if presented else "send an API key as Authorization: Bearer KEY"
            raise ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        if needed != "read" and needed not in key.scopes:
            self.metrics.rejected.labels("forbidden").inc()
            raise ApiError(403, "forbidden", f"this API key lacks the scope {needed}")
        return _Access(key, self.rates, self.metrics)


def _telling_rates(access: _Access, send: Send) -> Send:
    """``send`` that adds the key's rate headers to the answer, as they are once the request has been counted."""

    async def telling_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *access.rates.headers(access.key)]
        await send(message)

    return telling_send
