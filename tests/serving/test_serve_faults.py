"""The server as a process under load, when it is told to end, killed, or has nowhere to write its log."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from process_harness import serving, start, wait_until_ready
from serving_harness import WAIT_S, until

pytestmark = pytest.mark.slow

CLIENTS = 6


class Load:
    """Clients that ask again and again until :meth:`stop`; what they were answered, by status, 0 for no answer."""

    def __init__(self, url: httpx.URL) -> None:
        self._url = url
        self._stop = threading.Event()
        self.answers: Counter[int] = Counter()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._futures = [self._pool.submit(self._client, number) for number in range(CLIENTS)]

    def _client(self, number: int) -> None:
        seed = number
        while not self._stop.is_set():
            seed += CLIENTS
            try:
                # A connection of its own, without the certificates that a client would read for it.
                with httpx.Client(base_url=self._url, timeout=WAIT_S, verify=False) as client:
                    answer = client.post("/generate", json={"class_id": 1, "seed": seed, "steps": 1 + seed % 9})
                    if answer.status_code == 200:
                        assert len(answer.json()["images"]) == 1
                    self.answers[answer.status_code] += 1
            except httpx.TransportError:
                self.answers[0] += 1
                time.sleep(0.1)  # the next process needs the processor to start

    def stop(self) -> None:
        self._stop.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()


def test_sigterm_under_load_answers_all_that_was_taken() -> None:
    with serving("--max-batch-rows", "8") as (process, client):
        load = Load(client.base_url)
        try:
            until(lambda: load.answers[200] >= 30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            load.stop()
    log = [json.loads(line) for line in process.output.splitlines()]
    # Only refusals while it drained, and connections that came after the port was closed.
    assert set(load.answers) <= {200, 503, 0}
    assert log[-1]["message"] == "stopped"
    assert log[-1]["exit_code"] == 0
    refused = [line for line in log if line.get("status") == 503 and line["path"] == "/generate"]
    assert len(refused) == load.answers[503]
    assert not [line for line in log if line["level"] in ("error", "critical")]
    taken = [line for line in log if line.get("path") == "/generate" and line.get("status") == 200]
    assert len(taken) == load.answers[200]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_the_log_takes_no_request_down() -> None:
    with Path("/dev/full").open("w") as full:
        process = start("--log-level", "debug", stdout=full)

    def listening() -> list[int]:
        sockets = psutil.Process(process.pid).net_connections("tcp")
        return [each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN]

    try:
        until(lambda: bool(listening()), every_s=0.05)  # where it says so nothing can be read
        with httpx.Client(base_url=f"http://127.0.0.1:{listening()[0]}", timeout=WAIT_S) as client:
            wait_until_ready(client)
            for seed in range(20):
                assert client.post("/generate", json={"class_id": 1, "seed": seed, "steps": 1}).status_code == 200
            assert client.post("/generate", json={"class_id": 99}).status_code == 422
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
            assert process.error_output == ""
    finally:
        process.kill()
        process.wait()


def test_workers_that_keep_dying_end_the_process_with_one_line() -> None:
    change = """
def die(rows):
    if rows[0].spec.steps == 999:
        raise SystemExit("a fault beyond repair")
sampler.on_step = die"""
    with serving(change=change) as (process, client):
        answer = client.post("/generate", json={"class_id": 1, "steps": 999})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        wait_until_ready(client)
        assert client.post("/generate", json={"class_id": 1, "steps": 2}).status_code == 200  # by the third worker
        client.post("/generate", json={"class_id": 1, "steps": 999})
        assert process.wait(WAIT_S) == 1
        assert process.error_output.startswith("error: the engine has failed: ")
        assert len(process.error_output.splitlines()) == 1
