"""How tests wait for what happens in another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 60.0  # what is right takes a moment, unless the machine is busy


def until(condition: Callable[[], bool], every_s: float = 0.001) -> None:
    """Wait for ``condition``; the test fails when it does not come true."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
