"""The servers that are measured, each in a process of its own.

python -m bench.serving.servers {noop,continuous,window,litserve} PORT
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil

from server import launch
from server.fake import FakeRow, FakeSampler
from server.fleet import Fleet
from server.launch import bind, prepare
from server.logs import configure_logging
from server.pool import Pool
from server.settings import Settings

Kind = Literal["noop", "continuous", "window", "litserve"]

MAX_ROWS = 32
# For how long the servers that collect a batch do so: about one step of the bundled model at a full batch.
WINDOW_S = 0.05
START_TIMEOUT_S = 60


def checkpoint() -> str | None:
    """What every server serves, ours by its settings: ``--checkpoint``, or the bundled one if None."""
    return os.environ.get("ROBUQ_CHECKPOINT")


class NoOpSampler(FakeSampler):
    """Takes no time at all: a grey image, always the same."""

    def decode(self, row: FakeRow) -> np.ndarray:
        return np.full((self.image_size, self.image_size, 3), 128, dtype=np.uint8)


NOOP_WORKER = """
from bench.serving.servers import NoOpSampler
from server.worker import main
main(lambda options, weights: NoOpSampler())
"""


class WindowFleet(Fleet):
    """Window batching, what most servers do, to compare with: collect, run the batch to its end, collect again.

    The order, the bound of the queue and the deadlines are ours, too; an image that is done before its batch answers at
    once. Only the moment differs at which images may join. One worker.
    """

    _due: asyncio.TimerHandle | None = None

    def dispatch(self) -> None:
        (worker,) = self.workers
        if worker is None or not self.queue.images or len(worker.sent) > len(worker.decoding):
            return
        waited = max(self.pool.clock() - request.submitted_at for request in self.requests)
        if self.queue.images < MAX_ROWS and waited < WINDOW_S:
            if self._due is None:
                self._due = asyncio.get_running_loop().call_later(WINDOW_S - waited, self._window_ends)
            return
        super().dispatch()

    def _window_ends(self) -> None:
        self._due = None
        self.dispatch()


class WindowPool(Pool):
    fleet_type = WindowFleet


def bench_settings(port: int = 0) -> Settings:
    """A queue that refuses nobody and no cache, so that every system gets the same load; files of pixels alone."""
    return Settings(
        port=port,
        max_batch_rows=MAX_ROWS,
        max_queue_images=100_000,
        cache_bytes=0,
        embed_settings=False,
        log_level="warning",
    )


def serve_robuq(kind: Kind, port: int) -> int:
    """Our own server, as ``robuq-serve`` runs it."""
    settings = bench_settings(port)
    configure_logging(settings.log_level, settings.log_format)
    if kind == "noop":
        launch.WORKER_COMMAND = (sys.executable, "-c", NOOP_WORKER)
    sockets = bind(settings.host, port)
    prepared = prepare(settings)
    from server.lifecycle import serve

    return serve(settings, sockets, prepared, pool_type=WindowPool if kind == "window" else Pool)


@dataclass(frozen=True)
class Server:
    url: str
    process: psutil.Process

    def resident_bytes(self) -> int:
        return sum(each.memory_info().rss for each in (self.process, *self.process.children()))

    def cpu_seconds(self) -> float:
        times = [each.cpu_times() for each in (self.process, *self.process.children())]
        return sum(each.user + each.system for each in times)

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/info", timeout=10) as answer:
            return dict(json.load(answer))

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


@contextmanager
def running(kind: Kind) -> Iterator[Server]:
    """Start one, wait until it is ready, end it with its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "bench.serving.servers", kind, str(port)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_ready(f"{url}/{'health' if kind == 'litserve' else 'ready'}", child)
        yield Server(url, psutil.Process(child.pid))
    finally:
        child.send_signal(signal.SIGINT if kind == "litserve" else signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else's processes
            child.wait()


def _wait_until_ready(url: str, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the server has ended with code {child.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:  # not listening yet, or 503
            time.sleep(0.05)
    raise RuntimeError(f"{url} is not ready after {START_TIMEOUT_S} s")


if __name__ == "__main__":
    chosen, at = sys.argv[1], int(sys.argv[2])
    if chosen == "litserve":
        from bench.serving.litserve_app import serve_litserve

        serve_litserve(at, MAX_ROWS, WINDOW_S)
    elif chosen in ("noop", "continuous", "window"):
        sys.exit(serve_robuq(chosen, at))  # type: ignore[arg-type]
    else:
        sys.exit(f"no such server: {chosen}")
