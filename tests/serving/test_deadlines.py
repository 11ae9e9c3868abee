"""Deadlines are kept at every stage of a request, whatever the workers are doing."""

from __future__ import annotations

import threading

import numpy as np
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, sample, spec, until

from server.fake import FakeRow
from server.request import DeadlineExceeded


def test_a_waiting_request_expires_and_those_beside_it_do_not() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler, max_batch_rows=2) as engine:
        sampler.hold()
        running = engine.submit([spec(seed=1), spec(seed=2)], "png", timeout_s=60)
        late = engine.submit([spec(seed=3)], "png", timeout_s=0.05)
        in_time = engine.submit([spec(seed=4)], "png", timeout_s=60)
        assert sampler.entered.acquire(timeout=WAIT_S)
        assert isinstance(outcome(late), DeadlineExceeded)  # though the only worker is in a forward
        sampler.release()
        assert outcome(running) is None
        assert outcome(in_time) is None
        assert all(seed != 3 for batch in sampler.batches for seed, _ in batch)
        assert sample(engine, "robuq_requests_total", finished_reason="timeout") == 1


def test_a_request_that_a_stuck_worker_has_expires() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        patient = engine.submit([spec(seed=1, steps=2)], "png", timeout_s=600)
        assert sampler.entered.acquire(timeout=WAIT_S)
        late = [engine.submit([spec(seed=s, steps=1000)], "png", timeout_s=t) for s, t in ((2, 0.1), (3, 0.05))]
        assert engine.requests_waiting == 0  # the worker has them, if they have not ended yet
        assert all(isinstance(outcome(job), DeadlineExceeded) for job in late)
        sampler.release()
        assert outcome(patient) is None
        assert sampler.batches == [[(1, 0)], [(1, 1)]]


def test_a_request_behind_a_stuck_decoder_expires() -> None:
    sampler = WatchedSampler()
    gate = threading.Event()

    def stuck(row: FakeRow) -> np.ndarray:
        assert gate.wait(WAIT_S)
        return np.zeros((4, 4, 3), np.uint8)

    with running_engine(sampler, decode_threads=1) as engine:
        sampler.decode = stuck  # type: ignore[method-assign]
        jobs = [engine.submit([spec(seed=s, steps=1)], "png", timeout_s=1.0) for s in range(3)]
        assert all(isinstance(outcome(job), DeadlineExceeded) for job in jobs)
        assert engine.idle
        gate.set()
        until(lambda: engine.images_decoding == 0)
        assert sample(engine, "robuq_requests_total", finished_reason="completed") == 0
