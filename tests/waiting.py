"""How tests wait for what happens in another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 120.0  # what is right takes a moment, unless the machine is busy


def until(condition: Callable[[], bool], every_s: float = 0.001) -> None:
    """Wait for ``condition``; the test fails when it does not come true. Time for which this process stood still does
    not count."""
    left_s, before = WAIT_S, time.monotonic()
    while not condition():
        now = time.monotonic()
        left_s, before = left_s - min(now - before, 1.0), now
        assert left_s > 0, "waited in vain"
        time.sleep(every_s)
