"""Who may do what: API keys, their scopes and their rates, and the paths that need no key."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from server import keys
from server.errors import ApiError, invalid
from server.keys import ApiKey, RateUnit

# What orchestrators and load balancers ask, without a key and under any name.
PROBE_PATHS = frozenset({"/health", "/ready"})
# The pages hold nothing of the model and ask their user for a key. A path that is not named here needs one.
PUBLIC_PATHS = PROBE_PATHS | {"/", "/docs"}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
WINDOW_S = 60
ACCESS = "robuq.access"  # in the ASGI scope


def is_public(path: str) -> bool:
    """Whether ``path`` answers without a key."""
    return path in PUBLIC_PATHS or path.startswith("/web/")


def needed_scope(method: str, path: str) -> keys.Scope:
    """What a key must be allowed to do for this request."""
    if (path + "/").startswith("/admin/"):
        return "admin"
    return "read" if method in SAFE_METHODS else "generate"


def presented_key(headers: Headers) -> str | None:
    """The key of ``Authorization: Bearer KEY`` or else of ``X-API-Key: KEY``."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key", "").strip() or None  # the parser leaves blanks at the end


class Access(NamedTuple):
    """A key that was admitted, and the rates of all keys."""

    key: ApiKey
    rates: RateLimits


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
        access.rates.check(access.key, "images", images)
    yield
    if access is not None:
        access.rates.charge(access.key, "images", images)


@dataclass
class _Window:
    """What a key has used in the last minute: times and amounts, the oldest first."""

    entries: deque[tuple[float, int]] = field(default_factory=deque)
    used: int = 0

    def forget(self, until: float) -> None:
        while self.entries and self.entries[0][0] <= until:
            self.used -= self.entries.popleft()[1]

    def add(self, now: float, amount: int) -> None:
        self.entries.append((now, amount))
        self.used += amount

    def free_at(self, amount: int) -> float:
        """When that much of what is used now will be free again."""
        for at, used in self.entries:
            amount -= used
            if amount <= 0:
                return at + WINDOW_S
        return 0.0


class RateLimits:
    """What each key has used, by its name, in this process alone: a moving window of requests and one of images.

    Args:
        on_limited: called for each request that is rejected.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, on_limited: Callable[[], None] = lambda: None
    ) -> None:
        self._clock, self._on_limited = clock, on_limited
        self._windows: defaultdict[tuple[str, RateUnit], _Window] = defaultdict(_Window)

    def check(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Raise the 429 of a key whose window has no room for ``cost``, or 422 if it never will."""
        limit = key.limit(unit)
        if limit is None:
            return
        window, now = self._windows[key.name, unit], self._clock()
        window.forget(now - WINDOW_S)
        if window.used + cost <= limit:
            return
        if cost > limit:
            raise invalid("num_images", f"num_images must be at most {limit}: the limit of this key per minute")
        self._on_limited()
        seconds = max(1, math.ceil(window.free_at(window.used + cost - limit) - now))
        message = f"this key is limited to {limit} {unit} per minute; try again in {seconds} s"
        raise ApiError(429, "rate_limited", message, headers={"Retry-After": str(seconds)})

    def charge(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Count ``cost`` against a key that :meth:`check` let through."""
        if key.limit(unit) is not None:
            self._windows[key.name, unit].add(self._clock(), cost)
