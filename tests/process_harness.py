"""robuq-serve as a process of its own; :func:`start`'s has a sampler of 20 ms a step in place of a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
from waiting import WAIT_S, until

ROOT = Path(__file__).parents[1]

SERVE = "from server.cli import app; app()"
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


def launch(
    *command: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Begin a server by its command; without ``env``, this process's, with the sources to import from."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ROBUQ_PORT": "0"} if env is None else env
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def start(*options: str, change: str = "", stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    """Begin one of noise; ``change`` is Python that may alter ``sampler``."""
    return launch(sys.executable, "-c", PROGRAM.format(change=change), *options, stdout=stdout)


def told_address(process: subprocess.Popen[str]) -> str:
    """The base URL in the first line of its log."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"http://[\w.:]+", line)
    assert match, line or process.communicate(timeout=WAIT_S)[1]
    return match.group()


def answers(client: httpx.Client, path: str) -> int:
    """The status that a GET of ``path`` is answered with; 0 while nobody listens."""
    try:
        return client.get(path).status_code
    except httpx.TransportError:
        return 0


def wait_until_ready(client: httpx.Client) -> None:
    """Return when /ready is green."""
    until(lambda: answers(client, "/ready") == 200, every_s=0.05)  # it needs the processor to start


@contextmanager
def client_of(process: subprocess.Popen[str], **options: Mapping[str, str]) -> Iterator[httpx.Client]:
    """A client, of these options, of a server past its warm-up; the process is gone afterwards."""
    try:
        with httpx.Client(base_url=told_address(process), timeout=WAIT_S, **options) as client:  # type: ignore[arg-type]
            wait_until_ready(client)
            yield client
    finally:
        process.kill()
        process.communicate()


@contextmanager
def serving(*options: str, change: str = "") -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A running process of noise and a client of it, past its warm-up."""
    process = start(*options, change=change)
    with client_of(process) as client:
        yield process, client


def stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Tell it to end, which it does with 0; what it wrote to standard output and error since it told its address."""
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    return output, errors
