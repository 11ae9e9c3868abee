"""The load test runs headless against a server in every scenario, and notices a server that lies."""

from __future__ import annotations

import asyncio
import csv
import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from loaded_server import fake_server
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from waiting import WAIT_S, until

from server.fake import FakeSampler

ROOT = Path(__file__).parents[2]


class LyingSampler(FakeSampler):
    """Reports one size and generates another."""

    def decode(self, row):  # type: ignore[no-untyped-def]
        return super().decode(row)[:16, :16]


def attack(url: str, tmp_path: Path, wanted: dict[str, int], *options: str) -> tuple[int, str]:
    """Load until so many requests of each name are counted; locust's exit code and its output."""
    counted: Counter[str] = Counter()
    for seconds in (3, 12, 48):
        command = f"-f loadtest --headless --host {url} -u 8 -r 8 -t {seconds}s --steps 1,3 --only-summary"
        locust = subprocess.run(
            [sys.executable, "-m", "locust", *command.split(), "--csv", str(tmp_path / "load"), *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds + WAIT_S,
        )
        rows = csv.DictReader(io.StringIO((tmp_path / "load_stats.csv").read_text()))
        counted = Counter({row["Name"]: int(row["Request Count"]) for row in rows})
        if locust.returncode or counted >= Counter(wanted):
            return locust.returncode, locust.stdout + locust.stderr
    raise AssertionError(f"counted {counted}, not {wanted}")


def test_a_good_server_passes(tmp_path: Path) -> None:
    with fake_server(FakeSampler(step_s=0.001)) as (url, _):
        code, output = attack(url, tmp_path, {"/generate": 6, "/generate raw": 3}, "--target", "30")
    assert code == 0, output
    assert re.search(r"goodput: 100\.0% of \d+ within 30 s", output)


def test_a_server_that_lies_about_its_images_fails(tmp_path: Path) -> None:
    with fake_server(LyingSampler(step_s=0.001)) as (url, _):
        code, output = attack(url, tmp_path, {"/generate": 1})
    assert code == 1
    assert "(16, 16)" in output


@pytest.mark.parametrize(
    ("scenario", "step_s", "name"),
    [
        ("steady", 0.001, "/generate"),
        ("burst", 0.001, "/generate"),
        ("slow", 0.001, "/generate read slowly"),
        ("disconnect", 0.1, "/generate (left)"),
    ],
)
def test_every_scenario_runs_and_leaves_the_server_idle(
    scenario: str, step_s: float, name: str, tmp_path: Path
) -> None:
    with fake_server(FakeSampler(step_s=step_s)) as (url, engine):
        code, output = attack(url, tmp_path, {name: 1}, "--scenario", scenario)
        assert code == 0, output
        until(lambda: engine.idle)  # the last to leave may not have been noticed yet


def test_who_leaves_within_the_body_has_left_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = RequestResponseCycle.send

    async def late(cycle: RequestResponseCycle, message: Any) -> None:
        if message["type"] == "http.response.body" and cycle.scope["path"] == "/generate":
            await asyncio.sleep(0.6)  # more than anybody's patience
        await send(cycle, message)

    monkeypatch.setattr(RequestResponseCycle, "send", late)
    with fake_server(FakeSampler()) as (url, _):
        code, output = attack(url, tmp_path, {"/generate (left)": 1}, "--scenario", "disconnect")
    assert code == 0, output
