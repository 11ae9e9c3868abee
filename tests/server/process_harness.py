"""robuq-serve as a process of its own, with a sampler of 20 ms a step in place of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
from serving_harness import WAIT_S, until

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import robuq_core.pipeline as pipeline
from server.engine.fake import FakeSampler
sampler = FakeSampler(step_s=0.02)
{change}
pipeline.Sampler.from_checkpoint = classmethod(lambda *_, **__: sampler)
from server.cli import app
app()
"""


def start(
    *options: str, change: str = "", port: int = 0, stdout: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Begin; ``change`` is Python that may alter ``sampler``."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(change=change), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROBUQ_PORT": "0"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def told_address(process: subprocess.Popen[str]) -> str:
    """The base URL in the first line of its log."""
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    match = re.search(r"http://\S+", line["message"])
    assert match, line
    return match.group()


def answers(client: httpx.Client, path: str) -> int:
    """The status that a GET of ``path`` is answered with; 0 while nobody listens."""
    try:
        return client.get(path).status_code
    except httpx.TransportError:
        return 0


def wait_until_ready(client: httpx.Client) -> None:
    """Return when /ready is green."""
    until(lambda: answers(client, "/ready") == 200)


@contextmanager
def serving(*options: str, change: str = "") -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A running process and a client of it, past its warm-up."""
    process = start(*options, change=change)
    try:
        with httpx.Client(base_url=told_address(process), timeout=WAIT_S) as client:
            wait_until_ready(client)
            yield process, client
    finally:
        process.kill()
        process.communicate()
