"""The server as processes: signals, start-up failures, workers that die or hang, a full disk, a read-only root."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from process_harness import (
    ROOT,
    SERVE,
    Process,
    answers,
    client_of,
    launch,
    second_steps_wait,
    serving,
    start,
    stop,
    told_address,
    wait_until_ready,
)
from serving_harness import WAIT_S, until
from tiny import write_tiny

from server.keys import create_key


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


HANG = "sampler.on_step = lambda rows: time.sleep(600 if rows[0].spec.steps == 999 else 0)"


@pytest.mark.parametrize(
    ("drain_s", "then", "change"), [("0.2", None, ""), ("600", signal.SIGINT, ""), ("0.2", None, HANG)]
)
def test_a_drain_ends_in_time_at_a_second_signal_and_though_a_step_hangs(
    drain_s: str, then: signal.Signals | None, change: str
) -> None:
    with serving("--drain-timeout-s", drain_s, change=change) as (process, client), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/generate", json={"class_id": 1, "steps": 999})
        until(lambda: "robuq_requests_running 1.0" in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        if then is not None:
            until(lambda: client.get("/ready").status_code == 503)
            process.send_signal(then)
        answer = running.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
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


@pytest.mark.slow
def test_sigterm_under_load_answers_all_that_was_taken() -> None:
    stop = threading.Event()
    statuses: list[int] = []  # 0: no answer

    def ask_again_and_again(url: httpx.URL, seed: int) -> None:
        while not stop.is_set():
            seed += 6
            try:
                # A connection of its own, without the certificates that a client would read for it.
                with httpx.Client(base_url=url, timeout=WAIT_S, verify=False) as client:
                    answer = client.post("/generate", json={"class_id": 1, "seed": seed, "steps": 1 + seed % 9})
                statuses.append(answer.status_code)
                assert answer.status_code == 503 or len(answer.json()["images"]) == 1
            except httpx.TransportError:
                statuses.append(0)
                stop.wait(0.1)

    with serving("--max-batch-rows", "8") as (process, client), ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask_again_and_again, client.base_url, seed) for seed in range(6)]
        try:
            until(lambda: statuses.count(200) >= 30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            stop.set()
        for each in asking:
            each.result()
    log = [json.loads(line) for line in process.output.splitlines()]
    assert (log[-1]["message"], log[-1]["exit_code"]) == ("stopped", 0)
    assert not [line for line in log if line["level"] in ("error", "critical")]
    # Only refusals while it drained, and connections that came after the port was closed.
    assert set(statuses) <= {200, 503, 0}
    for status in (200, 503):
        logged = [line for line in log if line.get("path") == "/generate" and line["status"] == status]
        assert len(logged) == statuses.count(status)


@pytest.mark.slow
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


@pytest.mark.slow
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


# Every call of Python that would change a file system is told on standard error before robuq-serve begins.
PROGRAM = """
import os, sys
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
def watch(event, arguments):
    if event in CHANGES:
        print("WROTE", event, arguments[0], file=sys.stderr, flush=True)
    elif event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            print("WROTE", event, path, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from server.cli import app
app()
"""


@pytest.mark.slow
def test_nothing_is_written_outside_tmp(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = create_key(keys, "root", scopes=["admin", "generate"])
    process = launch(
        *(sys.executable, "-B", "-c", PROGRAM, "--port", "0", "--api-keys-file", keys),
        cwd=Path("/"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": "/tmp/triton"},
    )
    with client_of(process, headers={"X-API-Key": key}) as client:
        assert client.post("/generate", json={"class_id": 1, "steps": 1}).status_code == 200
        file = client.get("/admin/checkpoint").json()["files"][0]
        assert client.post("/admin/checkpoint", json={"path": file["path"]}).status_code == 200
        stop(process)
    assert json.loads(process.output.splitlines()[-1])["message"] == "stopped"
    written = [line.split(" ", 2)[2] for line in process.error_output.splitlines() if line.startswith("WROTE ")]
    assert [path for path in written if not path.startswith(("/tmp/", "/dev/"))] == []
