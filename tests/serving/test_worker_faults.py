"""Worker processes that die or hang, and a server that is killed: no request is lost, nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from process_harness import SERVE, Process, answers, client_of, launch, second_steps_wait, serving, wait_until_ready
from serving_harness import WAIT_S, until
from tiny import write_tiny

DRAW = {"class_id": 1, "seed": 5, "steps": 30}


def workers_of(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def is_gone(worker: psutil.Process) -> bool:
    return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def running(client: httpx.Client) -> int:
    count: int = client.get("/queue").json()["requests_running"]
    return count


def deaths(client: httpx.Client, reason: str) -> float:
    name = f'robuq_worker_deaths_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(name)) for line in client.get("/metrics").text.splitlines() if name in line)


def test_the_http_process_knows_no_torch() -> None:
    code = "import sys, server.cli, server.lifecycle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_in_a_step_costs_no_request(number: signal.Signals, tmp_path: Path) -> None:
    body, gate = {**DRAW, "num_images": 4}, tmp_path / "gate"
    gate.touch()
    change = second_steps_wait(DRAW["steps"], gate)
    with serving("--cache-bytes", "0", change=change) as (process, client), ThreadPoolExecutor(1) as pool:
        expected = client.post("/generate", json=body).json()["images"]
        (worker,) = workers_of(process)
        gate.unlink()
        answer = pool.submit(client.post, "/generate", json=body)
        until(lambda: running(client) > 0)
        worker.send_signal(number)
        until(lambda: deaths(client, "killed") == 1)
        gate.touch()
        assert answer.result().status_code == 200
        assert answer.result().json()["images"] == expected
        wait_until_ready(client)
        assert client.get("/health").status_code == 200
        assert [each.pid for each in workers_of(process) if not is_gone(each)] != [worker.pid]


def test_while_one_of_two_workers_is_dead_the_other_serves() -> None:
    with serving("--replicas", "2") as (process, client):
        workers_of(process)[0].kill()
        assert client.post("/generate", json=DRAW).status_code == 200
        assert client.get("/ready").status_code == 200
        until(lambda: deaths(client, "killed") == 1)
        until(lambda: [replica["alive"] for replica in client.get("/queue").json()["replicas"]] == [True, True])


def test_a_step_that_never_returns_is_ended_and_its_request_is_served(tmp_path: Path) -> None:
    hung = tmp_path / "hung"
    change = f"""
import pathlib
def hang_once(rows):
    if rows[0].spec.steps == 30 and not pathlib.Path({str(hung)!r}).exists():
        pathlib.Path({str(hung)!r}).touch()
        time.sleep(600)
sampler.on_step = hang_once"""
    with serving("--stall-timeout-s", "3", change=change) as (_, client):
        assert client.post("/generate", json=DRAW).status_code == 200
        assert hung.exists()
        until(lambda: deaths(client, "hung") >= 1)  # more if the machine is so busy that a step takes 3 s


def test_a_worker_that_is_stopped_from_outside_is_replaced() -> None:
    with serving("--stall-timeout-s", "3") as (process, client):
        workers_of(process)[0].suspend()
        assert client.post("/generate", json=DRAW).status_code == 200
        until(lambda: deaths(client, "hung") >= 1)


def test_a_server_that_is_killed_leaves_no_worker_behind() -> None:
    change = "sampler.on_step = lambda rows: time.sleep(600 if rows[0].spec.steps == 30 else 0)"
    with serving("--replicas", "2", change=change) as (process, client), ThreadPoolExecutor(1) as pool:
        workers = workers_of(process)
        answer = pool.submit(client.post, "/generate", json=DRAW)  # one of them hangs
        until(lambda: running(client) > 0)
        process.kill()
        process.wait(WAIT_S)
        until(lambda: len(workers) == 2 and all(map(is_gone, workers)))
        assert isinstance(answer.exception(WAIT_S), httpx.TransportError)


def test_sigterm_to_the_whole_group_lets_workers_finish(tmp_path: Path) -> None:
    """As an init system does, and Ctrl+C in a terminal."""
    gate = tmp_path / "gate"
    change = second_steps_wait(DRAW["steps"], gate)
    with serving("--drain-timeout-s", "600", change=change) as (process, client), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/generate", json=DRAW)
        until(lambda: running(client) > 0)
        for each in (*workers_of(process), process):
            each.send_signal(signal.SIGTERM)
        until(lambda: answers(client, "/ready") == 503)
        gate.touch()
        assert answer.result().status_code == 200
        assert process.wait(WAIT_S) == 0


@pytest.mark.slow
def test_a_replaced_worker_runs_on_the_weights_that_were_loaded_whatever_has_become_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tiny(path)
    process = launch(sys.executable, "-c", SERVE, "--checkpoint", str(path), "--cache-bytes", "0")
    with client_of(process) as client:
        body = {"class_id": 1, "seed": 5, "steps": 3}
        before = client.post("/generate", json=body).json()["images"]
        path.write_bytes(b"something else")
        workers_of(process)[0].kill()
        until(lambda: deaths(client, "killed") == 1)
        wait_until_ready(client)
        after = client.post("/generate", json={**body, "timeout_s": WAIT_S})
        assert after.json()["images"] == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_replicas_share_one_copy_of_the_weights() -> None:
    """Proportional memory: pages that n processes map count 1 / n in each."""
    process = launch(sys.executable, "-c", SERVE, "--replicas", "2", "--threads", "2")
    with client_of(process) as client:
        weights = client.get("/info").json()["weight_bytes"]
        assert client.post("/generate", json={"class_id": 1, "num_images": 8, "steps": 2}).status_code == 200
        mapped = []
        for worker in workers_of(process):
            maps = [entry for entry in worker.memory_maps() if "robuq-weights" in entry.path]
            mapped.append((sum(entry.rss for entry in maps), sum(entry.pss for entry in maps)))
        assert len(mapped) == 2
        for resident, proportional in mapped:
            assert resident >= 0.5 * weights  # rows of classes that were not asked for are not read
            assert proportional <= 0.6 * resident
