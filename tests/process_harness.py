"""robuq-serve as a process of its own; :func:`start`'s has a sampler of 20 ms a step in place of a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from waiting import WAIT_S, until

ROOT = Path(__file__).parents[1]

SERVE = "from server.cli import app; app()"
PROGRAM = """
import sys
import server.launch
server.launch.WORKER_COMMAND = (sys.executable, "-c", {worker!r})
{at_start}
from server.cli import app
app()
"""
WORKER = """
import sys, time
from server.fake import FakeSampler
sampler = FakeSampler(step_s=0.02)
{change}
from server.worker import main
main(lambda options, weights: sampler)
"""


class Process(subprocess.Popen[bytes]):
    """What it writes is kept in files: a pipe that nobody reads is full one day, and then the server stands still."""

    def __init__(self, command: Sequence[str | Path], stdout: IO[str] | None, **options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        with self._out.open("w") as out, self._err.open("w") as err:
            super().__init__(command, stdout=stdout or out, stderr=err, **options)

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self._out.read_text()

    @property
    def error_output(self) -> str:
        """Its standard error so far."""
        return self._err.read_text()


def launch(
    *command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, stdout: IO[str] | None = None
) -> Process:
    """Begin a server by its command; without ``env``, this process's, with the sources to import from."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ROBUQ_PORT": "0"} if env is None else env
    return Process(command, stdout, cwd=cwd, env=env)


def start(*options: str, change: str = "", at_start: str = "", stdout: IO[str] | None = None) -> Process:
    """Begin one of noise; ``change`` is Python that may alter ``sampler``, in each worker; ``at_start`` runs in the
    server itself."""
    program = PROGRAM.format(worker=WORKER.format(change=change), at_start=at_start)
    return launch(sys.executable, "-c", program, *options, stdout=stdout)


def second_steps_wait(steps: int, gate: Path) -> str:
    """A ``change``: images of so many steps wait before their second one until ``gate`` is there."""
    return f"""
import pathlib
def wait(rows):
    if any(row.spec.steps == {steps} and row.steps_done == 1 for row in rows):
        while not pathlib.Path({str(gate)!r}).exists():
            time.sleep(0.01)
sampler.on_step = wait"""


def told_address(process: Process) -> str:
    """The base URL in the first line of its log."""
    until(lambda: "\n" in process.output or process.poll() is not None, every_s=0.02)
    match = re.search(r"http://[\w.:]+", process.output.partition("\n")[0])
    assert match, process.output + process.error_output
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
def client_of(process: Process, **options: Mapping[str, str]) -> Iterator[httpx.Client]:
    """A client, of these options, of a server past its warm-up; the process is gone afterwards."""
    try:
        with httpx.Client(base_url=told_address(process), timeout=WAIT_S, **options) as client:  # type: ignore[arg-type]
            wait_until_ready(client)
            yield client
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(*options: str, change: str = "", at_start: str = "") -> Iterator[tuple[Process, httpx.Client]]:
    """A running process of noise and a client of it, past its warm-up."""
    process = start(*options, change=change, at_start=at_start)
    with client_of(process) as client:
        yield process, client


def stop(process: Process) -> None:
    """Tell it to end, which it does with 0."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0, process.error_output
