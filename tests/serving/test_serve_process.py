"""The server as a process: draining on SIGTERM, start-up failures, --help."""

from __future__ import annotations

import json
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from process_harness import SERVE, answers, launch, second_steps_wait, serving, start, told_address
from serving_harness import WAIT_S, until


def test_sigterm_ends_what_is_in_flight_and_refuses_the_rest(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    change = second_steps_wait(40, gate)
    with serving("--drain-timeout-s", "600", change=change) as (process, client), ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.post, "/generate", json={"class_id": i, "steps": 40}) for i in range(3)]
        until(lambda: client.get("/queue").json()["images_in_flight"] == 3)
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)  # still listening, to say so
        refused = client.post("/generate", json={"class_id": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert client.get("/health").status_code == 200
        gate.touch()
        assert [answer.result().status_code for answer in running] == [200, 200, 200]
        assert process.wait(WAIT_S) == 0
        assert json.loads(process.output.splitlines()[-1])["message"] == "stopped"


def test_the_drain_is_bounded() -> None:
    with serving("--drain-timeout-s", "0.2") as (process, client), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/generate", json={"class_id": 1, "steps": 1000})
        until(lambda: "robuq_requests_running 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        answer = running.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert process.wait(WAIT_S) == 0


def test_a_second_signal_does_not_wait() -> None:
    with serving("--drain-timeout-s", "600") as (process, client), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/generate", json={"class_id": 1, "steps": 1000})
        until(lambda: "robuq_requests_running 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert running.result().status_code == 503
        assert process.wait(WAIT_S) == 0


@pytest.mark.slow
def test_a_step_that_never_returns_does_not_keep_the_process_alive() -> None:
    hang = "import time; sampler.on_step = lambda rows: time.sleep(600 if rows[0].spec.steps == 999 else 0)"
    with serving("--drain-timeout-s", "0.2", change=hang) as (process, client), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/generate", json={"class_id": 1, "steps": 999})
        until(lambda: "robuq_requests_running 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 503
        assert process.wait(WAIT_S) == 0


@pytest.mark.slow
def test_a_warm_up_that_never_returns_shows_and_does_not_keep_the_process_alive() -> None:
    process = start("--stall-timeout-s", "2", change="import time; sampler.on_step = lambda rows: time.sleep(600)")
    try:
        with httpx.Client(base_url=told_address(process), timeout=WAIT_S) as client:
            until(lambda: answers(client, "/ready") == 503)
            until(lambda: 'deaths_total{reason="hung"} 1.0' in client.get("/metrics").text)
            assert client.get("/ready").json() == {"status": "starting"}
            assert client.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def test_a_failed_warm_up_ends_the_process_with_one_line() -> None:
    change = "sampler.on_step = lambda rows: sys.modules['missing']"
    process = start(change=change)
    assert process.wait(WAIT_S) == 1
    assert process.error_output.splitlines() == ["error: the engine has failed: KeyError: 'missing'"]


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", str(taken.getsockname()[1]))
        assert process.wait(WAIT_S) == 2
    assert len(process.error_output.splitlines()) == 1
    assert "cannot listen on 127.0.0.1 port" in process.error_output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--backend", "abacus"], "'abacus'"),
        (["--max-batch-rows", "0"], "--max-batch-rows (or ROBUQ_MAX_BATCH_ROWS)"),
    ],
)
def test_what_cannot_be_loaded_ends_the_process_with_one_line(options: list[str], message: str) -> None:
    process = launch(sys.executable, "-c", SERVE, *options)
    assert process.wait(WAIT_S) == 2
    assert process.error_output.startswith("error: ")
    assert message in process.error_output
    assert len(process.error_output.splitlines()) == 1
