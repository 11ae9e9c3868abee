"""Two Ray nodes on this machine, and clients that try again when a request fails for the cluster's sake."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WAIT_S = 120.0
_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
_PORT_IN_A_FILE = "dashboard_agent_listen_port"
# Ray's own pace is for clusters that run for days.
_HASTE = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
_SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
           "metrics_report_interval_ms": 1000, "agent_register_timeout_ms": 120_000}  # fmt: skip


def until(condition: Any, what: str) -> None:
    """Wait for ``condition``; the test fails when it does not come true."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def add_node(cluster: Any, sessions: Path, **more: Any) -> Any:
    """Another node of one CPU on loopback.

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
        return cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", env_vars=variables, **ports, **more)
    finally:
        added.set()
        teller.join()


@dataclass
class TwoNodes:
    """``cluster`` is a ``ray.cluster_utils.Cluster``; ``url`` that of Serve's proxy on the head node."""

    cluster: Any
    url: str
    sessions: Path
    worker: Any

    def lose_worker(self) -> None:
        """Kill every process of the second node, as a machine that loses power would."""
        self.cluster.remove_node(self.worker, allow_graceful=False)

    def regain_worker(self) -> None:
        self.worker = add_node(self.cluster, self.sessions)

    def exporters(self) -> list[str]:
        """Addresses of the Prometheus exporters of the nodes that are alive."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"]]
        return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive]


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """A head and a second node of one CPU each, on loopback, and Serve with a proxy on the head."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # Ray puts sockets there, whose paths must be short
    sessions = folder / "ray"
    sessions.mkdir()
    variables = {**_HASTE, "RAY_TMPDIR": str(folder)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    port = free_port()
    cluster = Cluster()
    try:
        add_node(cluster, sessions, include_dashboard=False, _system_config=_SYSTEM)
        nodes = TwoNodes(cluster, f"http://127.0.0.1:{port}", sessions, add_node(cluster, sessions))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        yield nodes
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@dataclass
class Load:
    """Threads that draw until told to stop, each image of a few seeds over and over, and try again when they must."""

    url: str
    threads: int
    steps: int
    seeds: int = 5
    answered: int = 0
    retries: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    images: dict[int, set[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.threads)]

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
        goal = self.answered + answers
        until(lambda: self.answered >= goal, f"{answers} more answers")

    def _work(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=WAIT_S) as client:
            seed = number
            while not self._stop.is_set():
                seed = (seed + 1) % self.seeds
                image = self._draw(client, seed)
                with self._lock:
                    if image is None:
                        self.lost.append(f"seed {seed}")
                    else:
                        self.answered += 1
                        self.images.setdefault(seed, set()).add(image)

    def _draw(self, client: httpx.Client, seed: int) -> bytes | None:
        body = {"class_id": seed, "seed": seed, "steps": self.steps}
        deadline = time.monotonic() + WAIT_S / 2
        while time.monotonic() < deadline:
            try:
                answer = client.post("/generate", json=body, headers={"Accept": "image/png"})
            except httpx.TransportError as error:
                why = type(error).__name__
            else:
                if answer.status_code == 200:
                    return answer.content
                why = str(answer.status_code)
                if answer.status_code < 500 and answer.status_code != 429:
                    return None
            with self._lock:
                self.retries.append(why)
            time.sleep(0.2)
        return None
