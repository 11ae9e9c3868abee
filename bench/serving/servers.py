"""The servers that are measured, each in a process of its own.

python -m bench.serving.servers {noop,continuous,window,litserve} PORT
"""

from __future__ import annotations

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
from typing import Literal

import numpy as np
import psutil

from server.engine.fake import FakeRow, FakeSampler
from server.settings import Settings

Kind = Literal["noop", "continuous", "window", "litserve"]

MAX_ROWS = 32
# For how long the servers that collect a batch do so: about one step of the bundled model at a full batch.
WINDOW_S = 0.05
START_TIMEOUT_S = 60


class NoOpSampler(FakeSampler):
    """Takes no time at all: a grey image, always the same."""

    def decode(self, row: FakeRow) -> np.ndarray:
        return np.full((self.image_size, self.image_size, 3), 128, dtype=np.uint8)


def bench_settings(port: int = 0) -> Settings:
    """A queue that refuses nobody, so that every system meets the same load."""
    return Settings(port=port, max_batch_rows=MAX_ROWS, max_queue_images=100_000, log_level="warning")


def serve_robuq(kind: Kind, port: int) -> int:
    """Our own server, as ``robuq-serve`` runs it."""
    from robuq_core.pipeline import Sampler
    from server.lifecycle import bind, serve
    from server.logs import configure_logging
    from server.scheduler import WindowScheduler

    settings = bench_settings(port)
    configure_logging(settings.log_level, settings.log_format)
    sampler = NoOpSampler() if kind == "noop" else Sampler.from_checkpoint()
    window = WindowScheduler(settings.max_queue_images, WINDOW_S, settings.priority_ageing_s)
    with bind(settings.host, port) as sock:
        return serve([sampler], settings, sock, scheduler=window if kind == "window" else None)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: psutil.Process

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
