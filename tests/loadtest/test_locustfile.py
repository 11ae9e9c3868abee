"""The load test runs headless against a server in every scenario, and notices a server that lies."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from loaded_server import fake_server

from server.engine.fake import FakeSampler

ROOT = Path(__file__).parents[2]


class LyingSampler(FakeSampler):
    """Says one size and draws another."""

    def decode(self, row):  # type: ignore[no-untyped-def]
        return super().decode(row)[:16, :16]


def attack(url: str, tmp_path: Path, *options: str) -> tuple[int, dict[str, int], str]:
    """Three seconds of load; locust's exit code, requests by name, and its output."""
    command = f"-f loadtest --headless --host {url} -u 8 -r 8 -t 3s --steps 1,3 --only-summary"
    locust = subprocess.run(
        [sys.executable, "-m", "locust", *command.split(), "--csv", str(tmp_path / "load"), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    rows = csv.DictReader(io.StringIO((tmp_path / "load_stats.csv").read_text()))
    return locust.returncode, {row["Name"]: int(row["Request Count"]) for row in rows}, locust.stdout + locust.stderr


def test_a_good_server_passes(tmp_path: Path) -> None:
    with fake_server(FakeSampler(step_s=0.001)) as (url, _):
        code, counts, output = attack(url, tmp_path)
    assert code == 0, output
    assert counts["/generate"] > 5
    assert counts["/generate raw"] > 2


def test_a_server_that_lies_about_its_images_fails(tmp_path: Path) -> None:
    with fake_server(LyingSampler(step_s=0.001)) as (url, _):
        code, _, output = attack(url, tmp_path)
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
        code, counts, output = attack(url, tmp_path, "--scenario", scenario)
        assert code == 0, output
        assert counts[name] > 0
        assert engine.idle
