"""The scenarios of the load test: who asks, and how many of them at which time. Knows no locust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BURST_PERIOD_S = 20.0
BURST_CALM = 0.25  # share of the users between bursts


@dataclass(frozen=True)
class Scenario:
    """Args:
    about: one line for the help.
    users: names of the user classes that take part; their weights say how many of each.
    share: of all users, as a function of the seconds since the start: 0..1.
    """

    about: str
    users: tuple[str, ...]
    share: Callable[[float], float] = lambda seconds: 1.0


def _bursts(seconds: float) -> float:
    """A quarter of the users, and all of them in the second half of every period."""
    return 1.0 if seconds % BURST_PERIOD_S >= BURST_PERIOD_S / 2 else BURST_CALM


SCENARIOS = {
    "mixed": Scenario("any mix of fields, JSON and raw answers, probes", ("ImageUser",)),
    "steady": Scenario("one image a request, defaults only, a constant number of users", ("PlainUser",)),
    "burst": Scenario("steady, but the users leave and come back all at once", ("PlainUser",), _bursts),
    "slow": Scenario("mixed, and clients that take their time to read the answer", ("ImageUser", "SlowReader")),
    "disconnect": Scenario("mixed, and clients that go away before the answer", ("ImageUser", "Leaver")),
}


def users_at(scenario: Scenario, seconds: float, users: int, run_time_s: float | None) -> int | None:
    """How many users there should be, at least one; None when the test is over."""
    if run_time_s is not None and seconds >= run_time_s:
        return None
    return max(1, round(users * scenario.share(seconds)))
