"""A real Prometheus with our configuration scrapes a real server: rules and dashboard work on what it stores."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy_harness import DEPLOY, dashboard_expressions
from serving_harness import WAIT_S, live_server, until

from server.fake import FakeSampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[httpx.Client]:
    """Our configuration but for the target and the intervals."""
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    (folder / "prometheus.yml").write_text(config.replace("server:8000", target).replace(": 15s", ": 1s"))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        "--web.listen-address=127.0.0.1:0",
    ]
    told = folder / "log"

    def address() -> str:
        match = re.search(r'"Listening on".* address=(\S+)', told.read_text())
        return "" if match is None else match[1]

    with told.open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            until(lambda: bool(address()), every_s=0.05)
            with httpx.Client(base_url=f"http://{address()}/api/v1", timeout=WAIT_S) as client:
                yield client
        finally:
            process.terminate()


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": expression})
    if answer.status_code == 503:  # it is starting
        return []
    assert answer.json()["status"] == "success", answer.text
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result


def rules(client: httpx.Client) -> list[dict[str, Any]]:
    return [rule for group in client.get("/rules").json()["data"]["groups"] for rule in group["rules"]]


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
            drawn += bool(query(client, "up == 1"))
            assert server.post("/generate", json={"class_id": 1, "num_images": 2}).status_code == 200
        assert len(rules(client)) == 7
        # A scrape that comes too late makes an alert pending, and what was scraped before it stale.
        until(lambda: {(rule["health"], rule["state"]) for rule in rules(client)} == {("ok", "inactive")}, every_s=0.2)
        for title, expression in dashboard_expressions():
            if title.startswith(("GPU", "Requests refused", "Share of requests")):  # nothing of that has happened
                query(client, expression)
                continue
            while not (result := query(client, expression)) or any(entry["value"][1] == "NaN" for entry in result):
                assert time.monotonic() < deadline + WAIT_S, f"{title}: {expression}: {result}"
                time.sleep(0.2)
