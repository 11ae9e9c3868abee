"""A real Prometheus with our configuration scrapes a real server: rules and dashboard work on what it stores."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy_harness import DEPLOY, dashboard_expressions
from serving_harness import live_server

from server.engine.fake import FakeSampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
WAIT_S = 60.0


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """Our configuration but for the target and the intervals."""
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    (folder / "prometheus.yml").write_text(config.replace("server:8000", target).replace(": 15s", ": 1s"))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1") as client:
                yield client
        finally:
            process.terminate()


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def test_prometheus_evaluates_every_rule_and_panel(tmp_path: Path) -> None:
    with (
        live_server(FakeSampler()) as (server, _),
        prometheus(f"127.0.0.1:{server.base_url.port}", tmp_path) as client,
    ):
        deadline = time.monotonic() + WAIT_S
        drawn = 0
        while drawn < 5:  # over some scrapes, so that rates have something to tell
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(1)
            try:
                drawn += bool(query(client, "up == 1"))
            except httpx.TransportError:
                continue  # it is starting
            assert server.post("/generate", json={"class_id": 1, "num_images": 2}).status_code == 200
        time.sleep(2)
        groups = client.get("/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == 7
        assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}
        for title, expression in dashboard_expressions():
            result = query(client, expression)
            if not title.startswith(("GPU", "Requests refused", "Share of requests")):  # nothing of that has happened
                assert result, f"{title}: {expression}"
                assert all(entry["value"][1] != "NaN" for entry in result), f"{title}: {expression}"
