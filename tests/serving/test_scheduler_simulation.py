"""Continuous against window batching on a simulated model: lower p99 at every load, whatever a step costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from server.scheduler import ContinuousScheduler, Demand, Scheduler, WindowScheduler

MAX_ROWS = 32
QUEUE = 10**6
STEP_COUNTS = (4, 10, 20, 50)
REQUESTS = 2000


def serve(scheduler: Scheduler, demands: list[Demand], step_s: Callable[[int], float]) -> np.ndarray:
    """Latencies of the demands, in order, of one replica whose step of n rows takes ``step_s(n)``."""
    now, arrived = 0.0, 0
    steps_done: Counter[int] = Counter()
    latencies = np.full(len(demands), np.nan)
    while np.isnan(latencies).any():
        while arrived < len(demands) and demands[arrived].arrived_at <= now:
            scheduler.submit(demands[arrived])
            arrived += 1
        keys = scheduler.schedule(0, MAX_ROWS, now)
        if not keys:
            next_arrival = demands[arrived].arrived_at if arrived < len(demands) else float("inf")
            now = min(next_arrival, scheduler.wake_at(now))
            continue
        now += step_s(len(keys))
        for key in keys:
            steps_done[key.request_id] += 1
            if steps_done[key.request_id] == demands[key.request_id].steps:
                scheduler.finish(key)
                latencies[key.request_id] = now - demands[key.request_id].arrived_at
    return latencies


# Seconds of a step: a small CPU, where rows cost; a GPU, where a step hardly grows with them.
CURVES: dict[str, Callable[[int], float]] = {
    "cpu": lambda rows: 0.002 + 0.001 * rows,
    "gpu": lambda rows: 0.02 + 0.0002 * rows,
}


@pytest.mark.parametrize("curve", sorted(CURVES))
@pytest.mark.parametrize("load", [0.3, 0.7, 0.95, 1.2])
@pytest.mark.parametrize("window_steps", [0, 4])
def test_lower_p99_at_every_load(curve: str, load: float, window_steps: int) -> None:
    step_s = CURVES[curve]
    capacity = MAX_ROWS / (float(np.mean(STEP_COUNTS)) * step_s(MAX_ROWS))
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(1 / (load * capacity), REQUESTS))
    steps = rng.choice(STEP_COUNTS, REQUESTS)
    demands = [Demand(i, 1, int(steps[i]), float(arrivals[i])) for i in range(REQUESTS)]
    window_s = window_steps * step_s(MAX_ROWS)
    ours = serve(ContinuousScheduler(QUEUE), demands, step_s)
    theirs = serve(WindowScheduler(QUEUE, window_s), demands, step_s)
    assert np.quantile(ours, 0.99) < np.quantile(theirs, 0.99)
    assert ours.mean() < theirs.mean()
