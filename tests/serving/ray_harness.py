"""A Ray cluster on this machine, and clients that try again when a request fails for the cluster's sake."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
WAIT_S = 180.0
# Not 127.0.0.1: Ray takes that for "this machine" and looks for the cluster at the address of a network interface,
# where a head that was told to be on loopback does not listen.
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
_PORT_IN_A_FILE = "dashboard_agent_listen_port"
_VARIABLES = {
    # Ray's own pace is for clusters that run for days,
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    # and its patience for machines with cores to spare.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
_SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
           "metrics_report_interval_ms": 1000, "agent_register_timeout_ms": 120_000}  # fmt: skip


def why_not() -> str | None:
    """Why no cluster can be had here; None if it can."""
    try:
        for host in (HEAD, WORKER):
            socket.create_server((host, 0)).close()
    except OSError as error:
        return f"no node can listen on {host}: {error}"
    return None


def until(condition: Any, what: str) -> None:
    """Wait for ``condition``; the test fails when it does not come true."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any."""
    while True:
        port = random.randrange(20_000, 32_768)
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port


def add_node(cluster: Any, sessions: Path, host: str, **more: Any) -> Any:
    """Another node of one CPU, on the loopback address ``host``.

    Ray gives a node's agent 15 seconds to start and to write its ports to files, and ends the node if it takes longer,
    as it does on a busy machine. So every port is chosen here, and the one that Ray reads from a file is in it already.
    """
    ports = {name: free_port() for name in (*_PORTS, _PORT_IN_A_FILE)}
    node_id = secrets.token_hex(28)
    added = threading.Event()

    def tell_port() -> None:
        while not added.is_set():
            for session in sessions.glob("session_2*"):
                file = session / f"{_PORT_IN_A_FILE}_{node_id}"
                if not file.exists():
                    file.write_text(str(ports[_PORT_IN_A_FILE]))
            added.wait(0.05)

    teller = threading.Thread(target=tell_port)
    teller.start()
    try:
        variables = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id}
        return cluster.add_node(num_cpus=1, node_ip_address=host, env_vars=variables, **ports, **more)
    finally:
        added.set()
        teller.join()


@dataclass
class LocalCluster:
    """``cluster`` is a ``ray.cluster_utils.Cluster``; ``url`` that of Serve's proxy on the head node."""

    cluster: Any
    url: str
    sessions: Path
    worker: Any = None

    def add_worker(self) -> None:
        """A second node."""
        self.worker = add_node(self.cluster, self.sessions, WORKER)

    def lose_worker(self) -> None:
        """Kill every process of the second node at once, as a machine that loses power would."""
        (raylet,) = self.worker.all_processes["raylet"]
        parent = psutil.Process(raylet.process.pid)
        for process in (*parent.children(recursive=True), parent):
            process.kill()
        self.cluster.remove_node(self.worker, allow_graceful=False)
        self.worker = None

    def serve_run(self, *arguments: str) -> None:
        """``serve run server.ray_app:app ARGUMENTS``, back when the application is ready."""
        command = ("-m", "ray.serve.scripts", "run", "--non-blocking", "--address", self.cluster.address)
        ran = subprocess.run(
            [sys.executable, *command, "server.ray_app:app", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=2 * WAIT_S,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """A head node of one CPU, on loopback, and Serve with a proxy there."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # Ray puts sockets there, whose paths must be short
    sessions = folder / "ray"
    sessions.mkdir()
    variables = {**_VARIABLES, "RAY_TMPDIR": str(folder)}
    before = {name: os.environ.get(name) for name in variables}
    at_sigterm = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
    os.environ.update(variables)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve._private import api

    api.HTTP_PROXY_TIMEOUT = WAIT_S  # no variable sets it
    port = free_port()
    cluster = Cluster()
    try:
        spared = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        add_node(cluster, sessions, HEAD, _system_config=_SYSTEM, **spared)
        ray.init(address=cluster.address, _node_ip_address=HEAD, log_to_driver=False, logging_level="error")
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        yield LocalCluster(cluster, f"http://127.0.0.1:{port}", sessions)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, at_sigterm)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class Load:
    """Threads that generate until they are stopped, each image of a few seeds over and over, and retry what fails."""

    def __init__(self, url: str, threads: int, steps: int, seeds: int) -> None:
        self.url, self.steps, self.seeds = url, steps, seeds
        self.images: list[tuple[int, bytes]] = []  # seed and file, of each answer
        self.retries: list[str] = []
        self.lost: list[int] = []
        self._stop = threading.Event()
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]

    def __enter__(self) -> Load:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(WAIT_S)
            assert not worker.is_alive()

    def more(self, answers: int) -> None:
        """Return when so many more requests have been answered."""
        goal = len(self.images) + answers
        until(lambda: len(self.images) >= goal, f"{answers} more answers")

    def _work(self, seed: int) -> None:
        with httpx.Client(base_url=self.url, timeout=WAIT_S) as client:
            while not self._stop.is_set():
                seed = (seed + 1) % self.seeds
                deadline = time.monotonic() + WAIT_S / 2
                while why := self._failure(client, seed):
                    self.retries.append(why)
                    if time.monotonic() > deadline:
                        self.lost.append(seed)
                        break
                    time.sleep(0.2)

    def _failure(self, client: httpx.Client, seed: int) -> str:
        try:
            answer = draw(client, seed, self.steps)
        except httpx.TransportError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:300]}"
        self.images.append((seed, answer.content))
        return ""


def draw(client: httpx.Client, seed: int, steps: int) -> httpx.Response:
    """Ask for the image of a seed, as PNG."""
    body = {"class_id": seed, "seed": seed, "steps": steps}
    return client.post("/generate", json=body, headers={"Accept": "image/png"})
