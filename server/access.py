"""Who may do what: API keys, their scopes and their rates, and the paths that need no key."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, get_args

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

from server import keys
from server.errors import ApiError, invalid
from server.keys import ApiKey, RateUnit
from server.metrics import Metrics

# What orchestrators and load balancers ask, without a key and under any name.
PROBE_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
# The pages hold nothing of the model and ask their user for a key. A path that is not named here needs one.
PUBLIC_PATHS = PROBE_PATHS | {"/", "/docs"}
PUBLIC_FOLDER = "/web/"
_ADMIN_FOLDER = "/admin/"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
WINDOW_S = 60
ACCESS = "robuq.access"  # in the ASGI scope


def is_public(path: str) -> bool:
    """Whether ``path`` answers without a key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER)


def needed_scope(method: str, path: str) -> keys.Scope:
    """What a key must be allowed to do for this request."""
    if (path + "/").startswith(_ADMIN_FOLDER):
        return "admin"
    return "read" if method in SAFE_METHODS else "generate"


def presented_key(headers: Headers) -> str | None:
    """The key of ``Authorization: Bearer KEY`` or else of ``X-API-Key: KEY``."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key", "").strip() or None  # the parser leaves blanks at the end


def client_of(scope: Scope) -> str:
    """The name of the request's API key, under which it shares the server; empty without one."""
    access: Access | None = scope.get(ACCESS)
    return access.key.name if access else ""


@contextmanager
def image_budget(request: Request, images: int) -> Iterator[None]:
    """Count ``images`` against the request's key if the block, which queues them, ends well; else 429 or 422.

    The block must not await, or another request could use the same room.
    """
    access: Access | None = request.scope.get(ACCESS)
    if access is not None:
        access.check("images", images)
    yield
    if access is not None:
        access.rates.charge(access.key, "images", images)


class Access(NamedTuple):
    """A key that was admitted, and its rates."""

    key: ApiKey
    rates: RateLimits
    metrics: Metrics

    def check(self, unit: RateUnit, cost: int = 1) -> None:
        try:
            self.rates.check(self.key, unit, cost)
        except ApiError as error:
            if error.status == 429:
                self.metrics.rejected.labels("rate_limited").inc()
            raise


def with_rates(access: Access, send: Send) -> Send:
    """``send`` that adds the key's rate headers to the answer, as they are once the request has been counted."""

    async def send_with_rates(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *access.rates.headers(access.key)]
        await send(message)

    return send_with_rates


class _Window:
    """What was used in the last minute: times and amounts, the oldest first."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int]] = deque()
        self.used = 0

    def expire(self, now: float) -> None:
        while self.entries and self.entries[0][0] <= now - WINDOW_S:
            self.used -= self.entries.popleft()[1]

    def seconds_until(self, room: int, limit: int, now: float) -> int:
        """Whole seconds until ``room`` of ``limit`` is free."""
        if room == limit:
            return math.ceil(self.entries[-1][0] + WINDOW_S - now) if self.entries else 0
        used = self.used
        for at, amount in self.entries:
            if used <= limit - room:
                break
            used -= amount
            until = at
        return math.ceil(until + WINDOW_S - now) if used < self.used else 0


class RateLimits:
    """What each key has used, by its name, in this process alone: a moving window of requests and one of images."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: defaultdict[tuple[str, RateUnit], _Window] = defaultdict(_Window)

    def _current(self, key: ApiKey, unit: RateUnit) -> tuple[int, _Window, float] | None:
        limit = key.requests_per_minute if unit == "requests" else key.images_per_minute
        if limit is None:
            return None
        now, window = self._clock(), self._windows[key.name, unit]
        window.expire(now)
        return limit, window, now

    def check(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Raise the 429 of a key whose window has no room for ``cost``, or 422 if it never will."""
        current = self._current(key, unit)
        if current is None or current[1].used + cost <= current[0]:
            return
        limit, window, now = current
        if cost > limit:
            raise invalid("num_images", f"num_images must be at most {limit}: the limit of this key per minute")
        seconds = max(1, window.seconds_until(cost, limit, now))
        message = f"this key is limited to {limit} {unit} per minute; try again in {seconds} s"
        raise ApiError(429, "rate_limited", message, headers={"Retry-After": str(seconds)})

    def charge(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Count ``cost`` against a key that :meth:`check` let through."""
        current = self._current(key, unit)
        if current is not None:
            current[1].entries.append((current[2], cost))
            current[1].used += cost

    def headers(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        """``RateLimit-Policy`` and ``RateLimit`` of a key with limits, in the form of the IETF's draft of 2025:
        quota q, window w, remaining r, seconds t until all of it is free again."""
        policy, state = [], []
        for unit in get_args(RateUnit):
            current = self._current(key, unit)
            if current is not None:
                limit, window, now = current
                policy.append(f'"{unit}";q={limit};w={WINDOW_S}')
                reset = window.seconds_until(limit, limit, now)
                state.append(f'"{unit}";r={max(0, limit - window.used)};t={reset}')
        if not policy:
            return []
        return [(b"ratelimit-policy", ", ".join(policy).encode()), (b"ratelimit", ", ".join(state).encode())]
