"""Open-loop load: requests arrive at random times, whether or not the server keeps up, like those of independent users.

    python -m loadtest.open_loop --host http://127.0.0.1:8000 --rate 5,10,20 --duration 20

Arrivals are a Poisson process from a seed. A request's latency counts from the time it was scheduled to be sent at, so
a server, or a generator, that falls behind cannot hide it (no coordinated omission). Nothing but the length of the test
bounds the requests in flight.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from numpy.typing import NDArray

from loadtest.workload import Workload
from robuq_core.errors import UserError
from robuq_core.files import replacing

TARGET_S = 1.0  # latency that counts as good
NO_ANSWER = 0  # in place of a status: the connection failed

# Sends request number i and returns the status of its answer.
Send = Callable[[int], Awaitable[int]]


@dataclass(frozen=True)
class Outcome:
    scheduled_s: float
    sent_s: float
    ended_s: float
    status: int

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.scheduled_s


@dataclass(frozen=True)
class Summary:
    """One rate. Latencies are those of the requests that were served (status 200), NaN without any.

    Args:
        offered, served: requests per second that were scheduled, and that were served until the last answer.
        goodput: share of the scheduled requests that were served within ``target_s``, 0..1.
        lag_s: how late the generator itself sent a request at worst; well below the latencies, or they mean little.
    """

    offered: float
    served: float
    statuses: dict[str, int]
    p50_s: float
    p99_s: float
    max_s: float
    target_s: float
    goodput: float
    lag_s: float


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> NDArray[np.float64]:
    """Times in ``[0, duration_s)``, ascending, of a Poisson process of ``rate`` events per second; float64 ``[n]``."""
    if not (rate > 0 and duration_s > 0):
        raise ValueError(f"rate and duration must be above 0, not {rate:g} and {duration_s:g}")
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, duration_s, rng.poisson(rate * duration_s)))


async def offer(send: Send, arrivals: Iterable[float]) -> list[Outcome]:
    """Call ``send(i)`` at each time of ``arrivals``, waiting for none of them; their outcomes in that order."""
    began = time.perf_counter()

    async def one(number: int, scheduled_s: float) -> Outcome:
        sent_s = time.perf_counter() - began
        status = await send(number)
        return Outcome(scheduled_s, sent_s, time.perf_counter() - began, status)

    tasks = []
    for number, scheduled_s in enumerate(arrivals):
        await asyncio.sleep(max(0.0, float(scheduled_s) - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(one(number, float(scheduled_s))))
    return list(await asyncio.gather(*tasks))


def summarise(outcomes: Sequence[Outcome], duration_s: float, target_s: float = TARGET_S) -> Summary:
    served = np.array([outcome.latency_s for outcome in outcomes if outcome.status == 200])
    p50, p99, most = np.quantile(served, [0.5, 0.99, 1.0]).tolist() if len(served) else 3 * [float("nan")]
    ended_s = max([duration_s, *(outcome.ended_s for outcome in outcomes)])
    statuses = Counter("no answer" if o.status == NO_ANSWER else str(o.status) for o in outcomes)
    return Summary(
        offered=len(outcomes) / duration_s,
        served=len(served) / ended_s,
        statuses=dict(sorted(statuses.items())),
        p50_s=p50,
        p99_s=p99,
        max_s=most,
        target_s=target_s,
        goodput=float((served <= target_s).sum()) / max(1, len(outcomes)),
        lag_s=max((outcome.sent_s - outcome.scheduled_s for outcome in outcomes), default=0.0),
    )


def http_sender(
    client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], answers: dict[int, bytes] | None = None
) -> Send:
    """POSTs ``bodies[i]`` to ``/generate``; ``answers`` collects what was served, to be checked after the test."""

    async def send(number: int) -> int:
        try:
            response = await client.post("/generate", json=bodies[number])
        except httpx.HTTPError:
            return NO_ANSWER
        if answers is not None and response.status_code == 200:
            answers[number] = response.content
        return response.status_code

    return send


async def run_rate(
    host: str, rate: float, duration_s: float, seed: int, workload: Workload, target_s: float = TARGET_S
) -> Summary:
    """One rate against a server, every answer checked.

    Raises:
        UserError: an answer does not hold what was asked for.
    """
    arrivals = poisson_arrivals(rate, duration_s, seed)
    bodies = [workload.mixed() for _ in arrivals]
    answers: dict[int, bytes] = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=host, timeout=None, limits=limits) as client:
        outcomes = await offer(http_sender(client, bodies, answers), arrivals)
    for number, answer in answers.items():
        try:
            workload.check(bodies[number], json.loads(answer))
        except (KeyError, ValueError, OSError) as error:
            raise UserError(f"{host}: bad answer to {bodies[number]}: {error!r}") from error
    return summarise(outcomes, duration_s, target_s)


def plot(series: dict[str, list[Summary]], path: Path, *, title: str) -> None:
    """Latency against load as SVG, a line for p50 and one for p99 of each series."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "robuq"  # equal figures give equal files
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for i, (name, summaries) in enumerate(series.items()):
        for quantile, style in (("p99", "-"), ("p50", "--")):
            latencies = [getattr(summary, f"{quantile}_s") for summary in summaries]
            offered = [summary.offered for summary in summaries]
            axes.plot(offered, latencies, f"o{style}", color=f"C{i}", label=f"{name}, {quantile}")
    axes.set(xlabel="offered load, requests per second", ylabel="latency, seconds", yscale="log", title=title)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    with replacing(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def as_json(summary: Summary) -> dict[str, Any]:
    """Its fields; null for a latency when nothing was served."""
    return {name: None if value != value else value for name, value in asdict(summary).items()}


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [0.0]
    if min(numbers) <= 0:
        raise UserError(f"expected numbers above 0, comma-separated, such as 5,10,20; got {text!r}")
    return numbers


def main(
    host: Annotated[str, typer.Option(help="Server to load.")] = "http://127.0.0.1:8000",
    rate: Annotated[str, typer.Option(help="Requests per second, comma-separated.")] = "5,10,20",
    duration: Annotated[float, typer.Option(help="Seconds of arrivals at each rate.", min=1)] = 20.0,
    target: Annotated[float, typer.Option(help="Seconds within which an answer counts for goodput.")] = TARGET_S,
    steps: Annotated[str, typer.Option(help="Step counts to choose from, comma-separated.")] = "4,10,20,50",
    seed: Annotated[int, typer.Option(help="Of arrivals and bodies.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of open-loop.json and .svg.")] = Path("loadtest/reports"),
) -> None:
    """Measure latency against load with Poisson arrivals."""
    rates, counts = _numbers(rate), [int(count) for count in _numbers(steps)]
    try:
        info = httpx.get(f"{host}/info", timeout=10).raise_for_status().json()
    except httpx.HTTPError as error:
        raise UserError(f"--host {host}: no usable /info: {error}; is robuq-serve running there?") from error
    summaries = []
    for number, each in enumerate(rates):
        workload = Workload(info, counts, rng=random.Random(seed + number))
        summaries.append(asyncio.run(run_rate(host, each, duration, seed + number, workload, target)))
        typer.echo(json.dumps(as_json(summaries[-1])))
    out.mkdir(parents=True, exist_ok=True)
    report = {"host": host, "duration_s": duration, "seed": seed, "step_counts": counts}
    with replacing(out / "open-loop.json") as part:
        part.write_text(json.dumps(report | {"rates": [as_json(each) for each in summaries]}, indent=2) + "\n")
    plot({"served": summaries}, out / "open-loop.svg", title="Latency from the scheduled arrival")
    typer.echo(f"written to {out}/open-loop.json and .svg")


if __name__ == "__main__":
    from robuq_core.cli_support import reported

    typer.run(reported(main))
