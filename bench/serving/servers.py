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

from loadtest.workload import gauges
from server import launch
from server.fake import FakeSampler
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

    def decode(self, row: object) -> np.ndarray:
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
    free = {"max_queue_images": 100_000, "cache_bytes": 0, "embed_settings": False}
    return Settings(port=port, max_batch_rows=MAX_ROWS, log_level="warning", **free)  # type: ignore[arg-type]


def serve_robuq(kind: Kind, port: int) -> int:
    """Our own server, as ``robuq-serve`` runs it."""
    settings = bench_settings(port)
    configure_logging(settings.log_level)
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

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return bytes(answer.read())

    def info(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/info")))

    def gauges(self) -> dict[str, float]:
        return gauges(self.get("/metrics").decode())

    def requests_left(self) -> float:
        found = self.gauges()
        return found["robuq_requests_running"] + found["robuq_requests_waiting"]


@contextmanager
def running(kind: Kind) -> Iterator[Server]:
    """Start one, wait until it is ready, end it with its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.serving.servers", kind, str(port)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(child.pid))
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(server, "/health" if kind == "litserve" else "/ready"):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{kind} is not ready; exit code {child.returncode}")
            time.sleep(0.05)
        yield server
    finally:
        child.send_signal(signal.SIGINT if kind == "litserve" else signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else's processes
            child.wait()


def _is_ready(server: Server, path: str) -> bool:
    try:
        return bool(server.get(path))
    except OSError:  # not listening yet, or 503
        return False


if __name__ == "__main__":
    chosen, at = sys.argv[1], int(sys.argv[2])
    if chosen == "litserve":
        from bench.serving.litserve_app import serve_litserve

        serve_litserve(at, MAX_ROWS, WINDOW_S)
    else:
        sys.exit(serve_robuq(chosen, at))  # type: ignore[arg-type]
