"""Over real sockets: shared forwards, clients that hang up, back-pressure, deadlines, faults."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from serving_harness import WAIT_S, Engine, WatchedSampler, after, live_server, sample, until

from server.fake import FakeRow


@contextmanager
def raw_request(client: httpx.Client, body: dict[str, object], headers: str = "") -> Iterator[socket.socket]:
    """A request on a socket of its own, whose answer nobody reads; the socket closes at the end."""
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as sock:
        sock.sendall(head + content)
        yield sock


def finished(engine: Engine, reason: str) -> float:
    return sample(engine, "robuq_requests_total", finished_reason=reason)


def test_rows_of_a_client_that_hung_up_are_gone_at_the_next_step() -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        sampler.hold()
        with raw_request(client, {"class_id": 1, "steps": 1000, "num_images": 6}):
            assert sampler.entered.acquire(timeout=WAIT_S)
        until(lambda: engine.idle and finished(engine, "cancelled") == 1)  # while that step still runs
        steps = len(sampler.batches)
        sampler.release()
        assert client.post("/generate", json={"class_id": 1, "steps": 2}).status_code == 200
        assert [len(batch) for batch in sampler.batches[steps:]] == [1, 1]


def test_a_client_that_hangs_up_within_its_body_is_no_fault_of_ours(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    until(lambda: any(getattr(record, "status", 0) == 499 for record in caplog.records))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_hangs_up_while_its_image_is_decoded_leaves_nothing() -> None:
    sampler = WatchedSampler()
    decoding, gate = threading.Event(), threading.Event()
    real_decode = sampler.decode

    def slow(row: FakeRow) -> np.ndarray:
        decoding.set()
        assert gate.wait(WAIT_S)
        return real_decode(row)

    with live_server(sampler, decode_threads=1) as (client, engine):
        sampler.decode = slow  # type: ignore[method-assign]
        with raw_request(client, {"class_id": 1, "steps": 1, "num_images": 4}):
            assert decoding.wait(WAIT_S)
        until(lambda: engine.idle and finished(engine, "cancelled") == 1)  # though the decoder is still at it
        gate.set()
        until(lambda: engine.images_decoding == 0)
        assert finished(engine, "completed") == 0
        # Of its four images only the one under way was decoded.
        assert sample(engine, "robuq_decode_duration_seconds_count") <= 1
        assert client.post("/generate", json={"class_id": 1}).status_code == 200


def test_a_deadline_is_kept_though_a_step_or_a_decoder_is_stuck() -> None:
    sampler, gate = WatchedSampler(), threading.Event()
    with live_server(sampler, max_batch_rows=2) as (client, engine):

        def too_late(**body: float) -> None:
            answer = client.post("/generate", json={"class_id": 1, **body})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert engine.idle

        sampler.hold()
        for number in (1, 2):  # the second waits for room
            too_late(timeout_s=0.05, seed=1000 + number)
        sampler.release()
        sampler.decode = after(gate, sampler.decode)  # type: ignore[method-assign]
        too_late(timeout_s=0.5, steps=1)
        gate.set()
        until(lambda: engine.images_decoding == 0)
        assert (finished(engine, "timeout"), finished(engine, "completed")) == (3, 0)


def test_a_fault_fails_one_request_and_tells_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler) as (client, _), ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(
                lambda seed: client.post(
                    "/generate", json={"class_id": 1, "seed": seed}, headers={"X-Request-Id": f"id-{seed}"}
                ),
                [6, 7, 8],
            )
        )
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["error"]["code"] == "generation_failed"
    assert "secret" not in answers[1].text
    failure = next(record for record in caplog.records if record.getMessage() == "request failed")
    assert failure.request_id == "id-7"  # type: ignore[attr-defined]
    assert failure.exc_info is not None
    assert "secret" in str(failure.exc_info[1])
