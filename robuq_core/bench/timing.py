"""Sides of a case, checked first and then timed in turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

from robuq_core.bench.report import BASELINE, Absent, SideTiming
from robuq_core.errors import UserError

MIN_ROUNDS = 3
MIN_SAMPLE_S = 2e-3  # one sample of a short call is a loop of at least this long
# A turn begins with an untimed call, so that none pays for waking threads and for what the side before left in the
# caches; calls longer than this do not notice. Before that comes a rest: OpenMP's threads spin for milliseconds after
# the last call of a side of torch's, and would take turns with ours on the same cores.
WARMED_BELOW_S, REST_S = 0.5, 0.02
# A peer that takes longer than this many times FP32, and longer than a second, is not waited for.
GIVE_UP_RATIO, GIVE_UP_S = 10.0, 1.0


class BenchError(UserError):
    """A benchmark whose numbers cannot be trusted."""


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Side:
    """One implementation: ``run()`` gives a result that must agree with ``expected()`` within ``tolerance``, as a
    relative error in the Frobenius norm. Where ``expected`` holds fewer images, they are those at ``images``.
    ``result``: what is compared, where that needs more work than what is timed.

    ``own``: a wrong result ends the benchmark; a peer's only takes the peer out. ``part``: of the work of the case, so
    that comparing it with FP32 would mean nothing.
    """

    name: str
    run: Callable[[], object]
    expected: Callable[[], Tensor]
    tolerance: float
    own: bool = False
    part: bool = False
    images: tuple[int, ...] | None = None
    result: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Timer:
    """``rounds`` at most, fewer where they would take longer than ``budget_s``, but never below :data:`MIN_ROUNDS`."""

    rounds: int = 11
    budget_s: float = 60.0
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    synchronize: Callable[[], None] = lambda: None

    @staticmethod
    def of(device: torch.device, rounds: int = 11, budget_s: float = 60.0) -> Timer:
        """A timer that waits for ``device``."""
        if device.type == "cuda":
            return Timer(rounds, budget_s, synchronize=torch.cuda.synchronize)
        return Timer(rounds, budget_s)

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Mean time of ``calls`` calls."""
        self.synchronize()
        began = self.clock()
        for _ in range(calls):
            run()
        self.synchronize()
        return (self.clock() - began) / calls


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``|result - expected| / |expected|``; NaN and shapes that differ count as infinite."""
    if result.shape != expected.shape:
        return math.inf
    result, expected = result.detach().float().cpu(), expected.detach().float().cpu()
    error = float((result - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def time_sides(sides: Sequence[Side], timer: Timer) -> tuple[list[SideTiming], list[Absent]]:
    """Check and time ``sides`` against the one called :data:`BASELINE`, which may be missing.

    Raises:
        BenchError: one of our own results is wrong.
    """
    ready: list[tuple[Side, float, float]] = []
    absent: list[Absent] = []
    baseline: float | None = None
    for side in sorted(sides, key=lambda side: side.name != BASELINE):
        try:
            error = _checked(side, timer, baseline)
            ready.append((side, error, timer.seconds(side.run)))
        except Unavailable as reason:
            absent.append(Absent(name=side.name, reason=str(reason)))
        if side.name == BASELINE and ready:
            baseline = ready[0][2]
    samples = _take_turns([(side, warm) for side, _, warm in ready], timer)
    of_baseline = next((samples[i] for i, (side, _, _) in enumerate(ready) if side.name == BASELINE), None)
    return [
        _timing(side, error, mine, of_baseline) for (side, error, _), mine in zip(ready, samples, strict=True)
    ], absent


def _checked(side: Side, timer: Timer, baseline: float | None) -> float:
    began = timer.clock()
    result = (side.result or side.run)()
    assert isinstance(result, Tensor)
    timer.synchronize()
    seconds = timer.clock() - began
    if not side.own and baseline and seconds > max(GIVE_UP_S, GIVE_UP_RATIO * baseline):
        raise Unavailable(f"one call took {seconds:.1f} s, {seconds / baseline:.0f} times FP32: not repeated")
    error = relative_error(result if side.images is None else result[list(side.images)], side.expected())
    if error <= side.tolerance:
        return error
    message = f"{side.name} is off by {error:.3g} of the norm; at most {side.tolerance:g} is rounding"
    if side.own:
        raise BenchError(f"{message}. No timing is reported")
    raise Unavailable(f"wrong result: {message}")


def _take_turns(sides: Sequence[tuple[Side, float]], timer: Timer) -> list[list[float]]:
    """Samples of each side, of which one call takes about so long."""
    calls = [max(1, math.ceil(MIN_SAMPLE_S / max(warm, 1e-7))) for _, warm in sides]
    round_s = sum(warm * (n + (warm < WARMED_BELOW_S)) for (_, warm), n in zip(sides, calls, strict=True))
    rounds = max(MIN_ROUNDS, min(timer.rounds, int(timer.budget_s / max(round_s, 1e-9))))
    samples: list[list[float]] = [[] for _ in sides]
    for first in range(rounds):
        for position in range(len(sides)):
            i = (first + position) % len(sides)  # none always follows the same neighbour
            side, warm = sides[i]
            timer.sleep(REST_S)
            if warm < WARMED_BELOW_S:
                side.run()
            samples[i].append(timer.seconds(side.run, calls[i]))
    return samples


def _timing(side: Side, error: float, mine: list[float], baseline: list[float] | None) -> SideTiming:
    low, middle, high = quantiles(mine, n=4, method="inclusive")
    return SideTiming(
        name=side.name,
        median_s=middle,
        p25_s=low,
        p75_s=high,
        min_s=min(mine),
        rounds=len(mine),
        relative_error=error,
        tolerance=side.tolerance,
        part=side.part,
        speedup=median(b / m for b, m in zip(baseline, mine, strict=True)) if baseline and not side.part else None,
    )
