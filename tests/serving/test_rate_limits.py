"""The windows of a key at any sequence of requests: never more than allowed in any minute, and Retry-After holds."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from server.access import WINDOW_S, RateLimits
from server.errors import ApiError
from server.keys import ApiKey


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now = 1.8e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key_of(images_per_minute: int | None, requests_per_minute: int | None = None, name: str = "k") -> ApiKey:
    return ApiKey(
        name=name,
        sha256="0" * 64,
        images_per_minute=images_per_minute,
        requests_per_minute=requests_per_minute,
        created=datetime.now(UTC),
    )


REQUESTS = st.lists(st.tuples(st.floats(0.001, 70), st.integers(1, 16)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, limit=st.integers(1, 40))
def test_no_minute_holds_more_than_the_limit_and_retry_after_holds(
    clock: Clock, requests: list[tuple[float, int]], limit: int
) -> None:
    rates, key = RateLimits(clock), key_of(limit)
    taken: list[tuple[float, int]] = []
    for wait, cost in requests:
        assume(cost <= limit)
        clock.now += wait
        try:
            rates.check(key, "images", cost)
        except ApiError as error:
            seconds = int(error.headers["Retry-After"])
            assert 1 <= seconds <= WINDOW_S
            recent = sum(images for at, images in taken if at > clock.now - WINDOW_S)
            assert recent + cost > limit, "refused although there was room"
            clock.now += seconds + 0.0005
            rates.check(key, "images", cost)
        rates.charge(key, "images", cost)
        taken.append((clock.now, cost))
    # Seconds since 1970 resolve a quarter of a microsecond: what is just 60 s old may fall on either side.
    for end, _ in taken:
        assert sum(images for at, images in taken if end - WINDOW_S + 1e-6 < at <= end) <= limit


def test_the_units_and_the_keys_are_apart(clock: Clock) -> None:
    rates = RateLimits(clock)
    one, other = key_of(2, 1, "one"), key_of(2, 1, "other")
    rates.charge(one, "images", 2)
    rates.check(one, "requests")
    rates.check(other, "images", 2)
    with pytest.raises(ApiError, match="2 images"):
        rates.check(one, "images")


def test_the_headers_tell_what_is_left(clock: Clock) -> None:
    rates, key = RateLimits(clock), key_of(10, 3)
    rates.charge(key, "images", 4)
    rates.charge(key, "requests")
    clock.now += 20.5
    headers = dict(rates.headers(key))
    assert headers[b"ratelimit-policy"] == b'"requests";q=3;w=60, "images";q=10;w=60'
    assert headers[b"ratelimit"] == b'"requests";r=2;t=40, "images";r=6;t=40'
