"""The load test runs headless against a server, and notices a server that lies."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SERVER = """
import sys
from robuq_core.pipeline import Sampler
from server.engine.fake import FakeSampler
sampler = FakeSampler(step_s=0.001, image_size={told})
sampler.decode = FakeSampler(image_size={drawn}).decode
Sampler.from_checkpoint = classmethod(lambda *_, **__: sampler)
from server.cli import app
app()
"""


def attack(tmp_path: Path, *, drawn: int, told: int) -> tuple[int, list[dict[str, str]], str]:
    """Three seconds of load on a fake server; locust's exit code, its table, and its output."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(drawn=drawn, told=told), "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        match = re.search(r"http://[\d.:]+", server.stdout.readline())
        assert match
        command = f"-f loadtest --headless --host {match.group()} -u 8 -r 8 -t 3s --steps 1,3 --only-summary"
        locust = subprocess.run(
            [sys.executable, "-m", "locust", *command.split(), "--csv", str(tmp_path / "load")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=40,
        )
    finally:
        server.kill()
        server.communicate()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "load_stats.csv").read_text())))
    return locust.returncode, rows, locust.stdout + locust.stderr


def test_a_good_server_passes(tmp_path: Path) -> None:
    code, rows, output = attack(tmp_path, drawn=32, told=32)
    assert code == 0, output
    counts = {row["Name"]: int(row["Request Count"]) for row in rows}
    assert counts["/generate"] > 5
    assert counts["/generate raw"] > 2
    assert {row["Failure Count"] for row in rows} == {"0"}


def test_a_server_that_lies_about_its_images_fails(tmp_path: Path) -> None:
    code, _, output = attack(tmp_path, drawn=16, told=32)
    assert code == 1
    assert "(16, 16)" in output
