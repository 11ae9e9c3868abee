"""The pool with one worker: batching at step level, isolation of faults, cancellation, back-pressure, draining."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, sample, spec, started_engine, until

from robuq_core.images import encode_image
from server.fake import FakeRow
from server.fleet import MAX_DEATHS
from server.remote_worker import RunFailed
from server.request import GenerationFailed, NotReady, WorkerDied


def test_rows_of_different_requests_and_timesteps_share_forwards() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        first = engine.submit([spec(seed=1, steps=4)], "png")
        assert sampler.entered.acquire(timeout=WAIT_S)
        second = engine.submit([spec(seed=2, steps=2), spec(seed=3, steps=2)], "png")
        sampler.release()
        first.future.result(WAIT_S)
        second.future.result(WAIT_S)
    # Joined at the very next step, each at its own timestep; left when done.
    assert sampler.batches == [[(1, 0)], [(1, 1), (2, 0), (3, 0)], [(1, 2), (2, 1), (3, 1)], [(1, 3)]]


def test_rows_that_moved_before_the_fault_are_not_stepped_twice() -> None:
    sampler = WatchedSampler()
    faults = iter([True])

    def fail_once_midway(rows: object) -> None:
        if len(rows) > 1 and next(faults, False):  # type: ignore[arg-type]
            rows[0].steps_done += 1  # type: ignore[index]
            raise RuntimeError

    with running_engine(sampler) as engine:
        sampler.on_step = fail_once_midway
        assert outcome(engine.submit([spec(seed=1), spec(seed=2)], "png")) is None
    assert sampler.batches == [[(1, 0), (2, 0)], [(2, 0)], [(1, 1), (2, 1)], [(1, 2), (2, 2)]]


def test_a_slow_decoder_holds_admission_back() -> None:
    sampler = WatchedSampler()
    gate = threading.Event()

    def slow(row: FakeRow) -> np.ndarray:
        assert gate.wait(WAIT_S)
        return np.zeros((4, 4, 3), np.uint8)

    with running_engine(sampler, max_batch_rows=2, max_queue_images=64) as engine:
        sampler.decode = slow  # type: ignore[method-assign]
        jobs = [engine.submit([spec(seed=s, steps=1)], "png") for s in range(20)]
        until(lambda: engine.images_decoding >= 4)
        assert engine.images_decoding <= 6  # twice the batch, and the batch that was under way
        assert engine.load().images_waiting >= 14
        gate.set()
        assert all(outcome(job) is None for job in jobs)


def test_a_worker_that_dies_is_replaced_and_its_images_are_tried_once_more() -> None:
    sampler = WatchedSampler()
    deaths = threading.Semaphore(1)

    def die(rows: Sequence[FakeRow]) -> None:
        if any(row.spec.seed == 1313 and row.steps_done == 1 for row in rows) and deaths.acquire(blocking=False):
            raise SystemExit("gone")

    with running_engine(sampler, max_batch_rows=2) as engine:
        sampler.on_step = die
        sampler.hold()
        jobs = [engine.submit([spec(seed=seed)], "png") for seed in (1313, 1, 2, 3)]
        sampler.release()
        assert [outcome(job) for job in jobs] == [None] * 4
        for seed, job in zip((1313, 1, 2, 3), jobs, strict=True):
            assert job.future.result().images[0] == encode_image(sampler.decode(FakeRow(spec(seed=seed))), "png")
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="exited") == 1)
        assert engine.status == "ready"


def test_a_request_whose_worker_dies_twice_fails_and_says_so() -> None:
    sampler = WatchedSampler()

    def die(rows: Sequence[FakeRow]) -> None:
        if any(row.spec.seed == 1313 for row in rows):
            raise SystemExit("gone")

    with running_engine(sampler, max_batch_rows=2) as engine:
        sampler.on_step = die
        sampler.hold()
        fatal = engine.submit([spec(seed=1313, guidance_scale=2)], "png")
        waiting = engine.submit([spec(seed=2, guidance_scale=2)], "png")
        sampler.release()
        assert isinstance(outcome(fatal), WorkerDied)
        assert outcome(waiting) is None
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="exited") == 2)
        assert sample(engine, "robuq_requests_total", finished_reason="error") == 1


def test_workers_that_die_again_and_again_fail_the_pool_and_strand_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.fleet.FIRST_PAUSE_S", 0.0)
    sampler = WatchedSampler()
    with running_engine(sampler, max_queue_images=64) as engine:

        def die(rows: Sequence[FakeRow]) -> None:
            if rows[0].spec.steps == 7:
                raise SystemExit("gone")

        sampler.on_step = die
        sampler.hold()
        jobs = [engine.submit([spec(seed=s, steps=7)] * 4, "png") for s in range(MAX_DEATHS)]
        sampler.release()
        assert all(isinstance(outcome(job), GenerationFailed | NotReady) for job in jobs)
        until(lambda: engine.status == "failed")
        assert isinstance(engine.failure, RunFailed)
        with pytest.raises(NotReady, match="failed"):
            engine.submit([spec()], "png")
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="exited") == MAX_DEATHS + 1)


def test_a_step_that_hangs_costs_its_worker_and_is_tried_again() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        job = engine.submit([spec()], "png")
        assert sampler.entered.acquire(timeout=WAIT_S)
        engine.make_stale()
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        sampler.release()
        assert outcome(job) is None
        until(lambda: engine.status == "ready")


def test_a_decoder_that_hangs_costs_its_worker_though_steps_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, gate = WatchedSampler(step_s=0.01), threading.Event()
    decode, hangs = sampler.decode, threading.Semaphore(1)

    def hang_once(row: FakeRow) -> np.ndarray:
        if row.spec.seed == 7 and hangs.acquire(blocking=False):
            assert gate.wait(WAIT_S)
        return decode(row)

    with running_engine(sampler) as engine:
        monkeypatch.setattr(sampler, "decode", hang_once)
        long = engine.submit([spec(seed=1, steps=100)], "png")
        stuck = engine.submit([spec(seed=7)], "png")
        until(lambda: engine.images_decoding >= 1)
        engine.make_stale(stage="decode")
        assert [outcome(stuck), outcome(long)] == [None, None]  # by the worker that replaced the first one
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        gate.set()


def test_a_worker_that_hangs_in_loading_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    gates, loads = (threading.Event(), threading.Event()), iter(range(10))

    def load(options: dict[str, object]) -> WatchedSampler:
        assert gates[next(loads)].wait(WAIT_S)
        return WatchedSampler()

    with started_engine(load) as engine:
        until(lambda: engine.call(lambda: engine.pool._fleet.present[0].phase) == "loading")
        engine.make_stale()
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        assert engine.status == "starting"
        with pytest.raises(NotReady):
            engine.model  # noqa: B018
        gates[1].set()
        until(lambda: engine.status == "ready")
        assert outcome(engine.submit([spec()], "png")) is None
        gates[0].set()


def test_warm_up_comes_before_ready_and_its_failure_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.QUICK_S", float("inf"))  # a size is run twice though it was held
    sampler = WatchedSampler()
    sampler.hold()
    with started_engine([sampler]) as engine:
        until(lambda: len(sampler.batches) == 1)
        with pytest.raises(NotReady, match="starting"):
            engine.submit([spec()], "png")
        sampler.release()
        until(lambda: engine.status == "ready")
        assert [len(batch) for batch in sampler.batches] == [1, 1, 2, 2]  # 1 and 4 rows, twice; guided images take 2

    sampler = WatchedSampler()
    sampler.faulty_seeds = {0}
    with started_engine([sampler]) as engine:
        until(lambda: engine.status == "failed")
        assert isinstance(engine.failure, RunFailed)
