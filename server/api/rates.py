"""How much a key may ask for in a minute: a moving window of requests and one of images."""

from __future__ import annotations

import bisect
from typing import get_args

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.api.errors import ApiError, invalid
from server.keys import ApiKey, RateUnit

UNITS: tuple[RateUnit, ...] = get_args(RateUnit)
WINDOW_S = 60


def _item(key: ApiKey, unit: RateUnit) -> RateLimitItemPerMinute | None:
    amount = key.requests_per_minute if unit == "requests" else key.images_per_minute
    return None if amount is None else RateLimitItemPerMinute(amount)


class RateLimits:
    """What each key has used, by its name, in this process alone."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._limiter = MovingWindowRateLimiter(self._storage)

    def check(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Raise the 429 of a key whose window has no room for ``cost``, or 422 if it never will."""
        item = _item(key, unit)
        if item is None or self._limiter.test(item, key.name, unit, cost=cost):
            return
        if cost > item.amount:
            raise invalid("num_images", f"num_images must be at most {item.amount}: this key may draw no more a minute")
        seconds = self._seconds_until(item, item.key_for(key.name, unit), cost)
        message = f"this key may ask for {item.amount} {unit} a minute; try again in {seconds} s"
        raise ApiError(429, "rate_limited", message, headers={"Retry-After": str(seconds)})

    def charge(self, key: ApiKey, unit: RateUnit, cost: int = 1) -> None:
        """Count ``cost`` against a key that :meth:`check` let through."""
        item = _item(key, unit)
        if item is not None:
            self._limiter.hit(item, key.name, unit, cost=cost)

    def headers(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        """``RateLimit-Policy`` and ``RateLimit`` of a key with limits, in the form of the IETF's draft of 2025:
        quota q, window w, remaining r, seconds t until all of it is free again."""
        policy, state = [], []
        for unit in UNITS:
            item = _item(key, unit)
            if item is not None:
                used_key = item.key_for(key.name, unit)
                used = self._storage.get_moving_window(used_key, item.amount, WINDOW_S)[1]
                reset = self._seconds_until(item, used_key, item.amount)
                policy.append(f'"{unit}";q={item.amount};w={WINDOW_S}')
                state.append(f'"{unit}";r={max(0, item.amount - used)};t={reset}')
        if not policy:
            return []
        return [(b"ratelimit-policy", ", ".join(policy).encode()), (b"ratelimit", ", ".join(state).encode())]

    def _seconds_until(self, item: RateLimitItemPerMinute, used_key: str, cost: int) -> int:
        """Whole seconds until the window has room for ``cost``: what is younger than the rest of the window stays."""

        def has_room(seconds: int) -> bool:
            return self._storage.get_moving_window(used_key, item.amount, WINDOW_S - seconds)[1] <= item.amount - cost

        return bisect.bisect_left(range(WINDOW_S), True, key=has_room)
