"""Latency against load under Poisson arrivals: step-level and window batching and LitServe, one model, one run."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.serving.client import closed_loop, run
from bench.serving.figures import Figure, Scale, require
from bench.serving.servers import MAX_ROWS, Kind, running
from loadtest.open_loop import Outcome, Summary, as_json, http_sender, offer, plot, poisson_arrivals, summarise
from loadtest.workload import Workload

LOADS = (0.3, 0.7, 0.95, 1.2)
STEP_COUNTS = (4, 10, 20, 50)
# An answer is good within this many times the latency of the longest request alone.
GOOD = 3.0
OTHERS: dict[Kind, str] = {"window": "window batching", "litserve": "LitServe"}


@dataclass
class Comparison:
    """Every system at every load, and the images that each generated."""

    capacity: float
    target_s: float  # latency that counts as good
    summaries: dict[Kind, list[Summary]] = field(default_factory=lambda: defaultdict(list))
    images: dict[tuple[float, int, int], bytes] = field(default_factory=dict)  # by load, round and request
    compared: int = 0
    dropped: Counter[Kind] = field(default_factory=Counter)


def _body(workload: Workload) -> dict[str, Any]:
    """Class, steps, sampler and seed vary; no guidance, so that an image takes one row on all sides."""
    return workload.mixed() | {"seed": workload.rng.randrange(2**32), "guidance_scale": 1.0}


def _workload(info: dict[str, Any], seed: int) -> Workload:
    return Workload(info, STEP_COUNTS, rng=random.Random(seed), fields=("sampler",))


def measure_capacity(seconds: float) -> tuple[Comparison, dict[str, Any]]:
    """Of the continuous server: requests a second when there are always more than it can run, and the latency of the
    longest request alone; and ``/info``."""
    with running("continuous") as server:
        info = server.info()
        workload = _workload(info, 0)
        for part in (seconds / 4, seconds):
            load = run(closed_loop(server.url, lambda: _body(workload), users=2 * MAX_ROWS, seconds=part))
        longest = workload.plain() | {"steps": max(STEP_COUNTS), "guidance_scale": 1.0}
        alone = run(closed_loop(server.url, lambda: longest, users=1, requests=9))
    require(load.all_served, "a request was not served")
    return Comparison(load.rate, GOOD * median(answer.seconds for answer in alone.answers)), info


def compare(kinds: Sequence[Kind], scale: Scale) -> Comparison:
    """Each system at each load, with the same arrivals and bodies; in short rounds, so that all meet one machine."""
    seconds, rounds = scale.of(15, 4), scale.of(3, 1)
    comparison, info = measure_capacity(scale.of(30, 6))
    for share in LOADS:
        outcomes: defaultdict[Kind, list[Outcome]] = defaultdict(list)
        for turn in range(rounds):
            arrivals = poisson_arrivals(share * comparison.capacity, seconds, seed=turn)
            workload = _workload(info, turn + 1)
            bodies = [_body(workload) for _ in arrivals]
            for kind in (kinds[(turn + i) % len(kinds)] for i in range(len(kinds))):  # none always first
                with running(kind) as server:
                    measured, answers = run(_offer(server.url, bodies, arrivals))
                outcomes[kind] = appended(outcomes[kind], measured)
                _check(comparison, kind, (share, turn), bodies, answers, workload)
        for kind in kinds:
            comparison.summaries[kind].append(summarise(outcomes[kind], rounds * seconds, comparison.target_s))
    return comparison


def appended(before: list[Outcome], measured: list[Outcome]) -> list[Outcome]:
    """Outcomes of two rounds, the second shifted to begin when the first has ended."""
    end = max((outcome.ended_s for outcome in before), default=0.0)
    return before + [Outcome(o.scheduled_s + end, o.sent_s + end, o.ended_s + end, o.status) for o in measured]


async def _offer(url: str, bodies: list[dict[str, Any]], arrivals: Any) -> tuple[list[Outcome], dict[int, bytes]]:
    answers: dict[int, bytes] = {}
    # Idle connections go before a server closes them (uvicorn: 5 s): a request sent just then would be lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        warm = http_sender(client, bodies[:8])
        await asyncio.gather(*(warm(i) for i in range(min(8, len(bodies)))))
        return await offer(http_sender(client, bodies, answers), arrivals), answers


def _check(
    comparison: Comparison,
    kind: Kind,
    series: tuple[float, int],
    bodies: list[dict[str, Any]],
    answers: dict[int, bytes],
    workload: Workload,
) -> None:
    """We serve every request, and all systems generate the same images. What others drop is a figure, not a fault."""
    require(kind != "continuous" or len(answers) == len(bodies), f"served {len(answers)} of {len(bodies)} requests")
    comparison.dropped[kind] += len(bodies) - len(answers)
    for number, answer in answers.items():
        content = json.loads(answer)
        workload.check(bodies[number], content)
        image = base64.b64decode(content["images"][0])
        first = comparison.images.setdefault((*series, number), image)
        require(first == image, f"{kind} generated another image of {bodies[number]}")
        comparison.compared += first is not image


def figure(comparison: Comparison, other: Kind) -> Figure:
    """Continuous batching against another system: p99 at every load, and throughput at the highest."""
    pairs = list(zip(comparison.summaries["continuous"], comparison.summaries[other], strict=True))
    ratios = [theirs.p99_s / ours.p99_s for ours, theirs in pairs]
    lines = [
        f"{share:g}x: p50 {a.p50_s:.2f} / {b.p50_s:.2f} s, p99 {a.p99_s:.2f} / {b.p99_s:.2f} s "
        f"({ratio:.1f} times lower), served {a.served:.1f} / {b.served:.1f} /s, "
        f"goodput {a.goodput:.0%} / {b.goodput:.0%}"
        for share, (a, b), ratio in zip(LOADS, pairs, ratios, strict=True)
    ]
    return Figure(
        f"against {OTHERS[other]}",
        "\n".join(lines),
        f"lower p99 at every load (capacity {comparison.capacity:.1f}/s; good: within {comparison.target_s:.2f} s)",
        min(ratios) > 1,
        f"we served all, {OTHERS[other]} all but {comparison.dropped[other]}; {comparison.compared:,} images "
        "equal between systems",
        {
            "capacity_per_s": comparison.capacity,
            "loads": LOADS,
            "target_s": comparison.target_s,
            "dropped": dict(comparison.dropped),
            "p99_ratio": ratios,
            "ours": [as_json(ours) for ours, _ in pairs],
            "theirs": [as_json(theirs) for _, theirs in pairs],
        },
    )


def figures(others: Sequence[Kind], scale: Scale, folder: Path | None) -> list[Figure]:
    """The comparison with each of the others, which share one run; the plot of latency against load into ``folder``."""
    comparison = compare(["continuous", *others], scale)
    if folder is not None:
        series = {OTHERS.get(kind, "step-level batching"): found for kind, found in comparison.summaries.items()}
        plot(series, folder / "serving-latency.svg", title="Latency from the scheduled arrival, Poisson arrivals")
    return [figure(comparison, other) for other in others]
