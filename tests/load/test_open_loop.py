"""Arrivals that are Poisson, latencies that hide nothing, reports that can be read."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from loaded_server import fake_server
from test_scenarios import INFO
from typer.testing import CliRunner
from waiting import WAIT_S

from loadtest.open_loop import Outcome, as_json, main, offer, poisson_arrivals, run_rate, summarise
from loadtest.workload import Workload
from robuq_core.errors import UserError
from server.fake import FakeSampler


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_arrivals(50, 1000, seed=1)
    assert np.array_equal(times, poisson_arrivals(50, 1000, seed=1))
    assert np.all((times >= 0) & (times < 1000))
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert len(times) == pytest.approx(50_000, rel=0.02)  # four standard deviations of the count
    assert gaps.mean() == pytest.approx(0.02, rel=0.02)
    # An exponential's standard deviation is its mean, and gaps do not remember each other.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02
    # Counts of equal intervals vary as much as their mean.
    counts = np.histogram(times, bins=1000, range=(0, 1000))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)


@pytest.mark.parametrize(("rate", "duration_s"), [(0, 1), (1, 0), (-1, 1), (math.nan, 1)])
def test_no_arrivals_without_a_rate_and_a_duration(rate: float, duration_s: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        poisson_arrivals(rate, duration_s, 0)


def test_a_stalled_server_delays_nobody_else_and_hides_nothing() -> None:
    """A server that takes one request at a time: the fifth has waited for four, though all were sent in time."""
    service_s = 0.05

    async def run() -> list[Outcome]:
        one_at_a_time, all_sent = asyncio.Lock(), asyncio.Event()

        async def send(number: int) -> int:
            if number == 4:
                all_sent.set()
            async with one_at_a_time:
                await asyncio.wait_for(all_sent.wait(), WAIT_S)
                await asyncio.sleep(service_s)
            return 200

        return await offer(send, [0.0, 0.001, 0.002, 0.003, 0.004])

    outcomes = asyncio.run(run())
    for number, outcome in enumerate(outcomes):
        assert outcome.latency_s >= (number + 1) * service_s - 0.005


def test_a_generator_that_falls_behind_counts_it() -> None:
    async def run() -> list[Outcome]:
        async def blocking(number: int) -> int:
            time.sleep(0.05)
            return 200

        return await offer(blocking, [0.0, 0.0, 0.0])

    summary = summarise(asyncio.run(run()), 1.0)
    assert summary.lag_s >= 0.09
    assert summary.max_s >= 0.14


def test_summaries_keep_refusals_out_of_the_latencies() -> None:
    outcomes = [Outcome(i, i, i + 0.1 * (i + 1), 200) for i in range(10)] + [Outcome(10, 10, 10.001, 429)]
    summary = summarise([*outcomes, Outcome(11, 11, 15, 0)], duration_s=12.0)
    assert summary.statuses == {"200": 10, "429": 1, "no answer": 1}
    assert summary.offered == 1.0
    assert summary.served == 10 / 15
    assert summary.goodput == 10 / 12  # of all that were scheduled
    assert summarise(outcomes, 12.0, target_s=0.55).goodput == 5 / 11
    assert summary.p50_s == pytest.approx(0.55)
    assert summary.max_s == pytest.approx(1.0)
    nothing = as_json(summarise([Outcome(0, 0, 1, 503)], 1.0))
    assert nothing["p99_s"] is None
    json.dumps(nothing, allow_nan=False)


def test_the_command_measures_a_server(tmp_path: Path) -> None:
    with fake_server(FakeSampler(step_s=0.001)) as (url, _):
        options = ["--rate", "20,40", "--duration", "1", "--steps", "1,2", "--out", str(tmp_path)]
        app = typer.Typer()
        app.command()(main)
        result = CliRunner().invoke(app, ["--host", url, *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "open-loop.json").read_text())
    assert [set(rate["statuses"]) for rate in report["rates"]] == [{"200"}, {"200"}]
    assert report["rates"][1]["offered"] > report["rates"][0]["offered"]
    assert {path.name for path in tmp_path.iterdir()} == {"open-loop.json", "open-loop.svg"}


def test_a_server_that_lies_is_told_on() -> None:
    with fake_server(FakeSampler(image_size=16)) as (url, _):
        workload = Workload({**INFO, "num_classes": 5}, [1], rng=random.Random(0))
        with pytest.raises(UserError, match="bad answer"):
            asyncio.run(run_rate(url, 20, 0.5, 0, workload))
