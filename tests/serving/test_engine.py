"""The engine: batching at step level, isolation of faults, cancellation, back-pressure, draining."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from serving_harness import WAIT_S, WatchedSampler, make_settings, outcome, running_engine, sample, spec, until

from server.engine import GenerationFailed, NotReady, Overloaded
from server.engine.create import create_engine
from server.engine.errors import Cancelled
from server.fake import FakeRow
from robuq_core.images import encode_image
from server.engine.supervisor import MAX_RESTARTS
from server.scheduler import StepTimeCurve


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


def test_images_are_in_order_and_timings_add_up() -> None:
    sampler = WatchedSampler(step_s=0.002)
    specs = [spec(seed=seed, steps=1 + (5 - seed) % 5) for seed in range(10)]
    with running_engine(sampler) as engine:
        result = engine.submit(specs, "png").future.result(WAIT_S)
        assert engine.idle
    expected = [encode_image(sampler.decode(FakeRow(s)), "png") for s in specs]
    assert list(result.images) == expected
    timings = result.timings
    assert min(timings.queue_s, timings.inference_s, timings.decode_s) >= 0
    assert timings.queue_s + timings.inference_s + timings.decode_s == pytest.approx(timings.total_s)


def test_a_faulty_row_fails_its_own_request_only() -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with running_engine(sampler) as engine:
        sampler.hold()
        plug = engine.submit([spec(seed=1, steps=2)], "png")
        assert sampler.entered.acquire(timeout=WAIT_S)
        bad = engine.submit([spec(seed=6), spec(seed=7)], "png")
        good = engine.submit([spec(seed=8)], "png")
        sampler.release()
        assert isinstance(outcome(bad), GenerationFailed)
        assert "secret" not in str(outcome(bad))
        assert outcome(plug) is None
        assert outcome(good) is None
        assert good.future.result().images[0] == encode_image(sampler.decode(FakeRow(spec(seed=8))), "png")
        assert sample(engine, "robuq_requests_total", finished_reason="error") == 1
        assert sample(engine, "robuq_requests_total", finished_reason="completed") == 2
        until(lambda: engine.idle)


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


@pytest.mark.parametrize("stage", ["start", "decode"])
def test_a_fault_outside_the_forward_is_isolated_too(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        real = getattr(sampler, stage)

        def raising(argument: object) -> object:
            if getattr(argument, "spec", argument).seed == 7:  # type: ignore[attr-defined]
                raise ValueError("no")
            return real(argument)

        monkeypatch.setattr(sampler, stage, raising)
        jobs = [engine.submit([spec(seed=seed)], "png") for seed in (6, 7, 8)]
        assert [type(outcome(job)) for job in jobs] == [type(None), GenerationFailed, type(None)]
        until(lambda: engine.idle)


def test_cancelled_rows_are_gone_at_the_next_step() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        keep = engine.submit([spec(seed=1, steps=3)], "png")
        drop = engine.submit([spec(seed=2, steps=1000), spec(seed=3, steps=1000)], "png")
        until(lambda: len(sampler.batches) == 1)
        sampler.permit()
        until(lambda: len(sampler.batches) == 2 and len(sampler.batches[1]) == 3)
        engine.cancel(drop)
        engine.cancel(drop)  # twice is as good as once
        sampler.release()
        assert outcome(keep) is None
        assert isinstance(outcome(drop), Cancelled)
        assert all(seed == 1 for batch in sampler.batches[2:] for seed, _ in batch)
        assert sample(engine, "robuq_requests_total", finished_reason="cancelled") == 1
        assert sample(engine, "robuq_requests_running") == sample(engine, "robuq_requests_waiting") == 0
        assert outcome(engine.submit([spec(seed=4)], "png")) is None


def test_cancel_while_waiting_and_after_the_end() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler, max_batch_rows=2) as engine:
        sampler.hold()
        first = engine.submit([spec(seed=1, guidance_scale=1.5)], "png")
        waiting = engine.submit([spec(seed=2, guidance_scale=1.5)], "png")
        until(lambda: len(sampler.batches) == 1)
        assert (engine.requests_running, engine.requests_waiting) == (1, 1)
        engine.cancel(waiting, "timeout")
        sampler.release()
        assert outcome(first) is None
        engine.cancel(first)
        assert {seed for batch in sampler.batches for seed, _ in batch} == {1}
        assert sample(engine, "robuq_requests_total", finished_reason="timeout") == 1
        assert sample(engine, "robuq_requests_total", finished_reason="cancelled") == 0


def test_a_future_that_its_client_cancels_hurts_nobody() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        jobs = [engine.submit([spec(seed=s)], "png") for s in range(3)]
        assert not jobs[1].future.cancel()
        jobs[2].future.add_done_callback(lambda future: 1 / 0)
        sampler.release()
        assert [outcome(job) for job in jobs] == [None, None, None]
        assert outcome(engine.submit([spec()], "png")) is None


def test_the_queue_is_bounded_in_images_and_tells_when_to_come_back() -> None:
    sampler = WatchedSampler(step_s=0.01)
    with running_engine(sampler, max_batch_rows=2, max_queue_images=16) as engine:
        replica = engine._replicas[0]
        assert replica.curve is not None
        assert replica.curve.seconds(2) >= 0.01  # as measured
        replica.curve = StepTimeCurve()
        replica.curve.observe(2, 0.01)
        sampler.hold()
        engine.submit([spec(seed=s, steps=100) for s in range(2)], "png")
        until(lambda: len(sampler.batches) == 1)
        engine.submit([spec(steps=100)] * 16, "png")
        with pytest.raises(Overloaded) as refused:
            engine.submit([spec(steps=100)] * 3, "png")
        # The two that run and three that wait, two at a time, 100 steps of 10 ms each.
        assert refused.value.retry_after_s == pytest.approx(2.5)
        assert sample(engine, "robuq_rejected_total", reason="queue_full") == 1


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
        threading.Event().wait(0.05)
        assert engine.images_decoding <= 6  # twice the batch, and the batch that was under way
        gate.set()
        assert all(outcome(job) is None for job in jobs)


def test_drain_ends_what_is_in_flight_and_takes_no_more() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        job = engine.submit([spec()], "png")
        engine.begin_drain()
        assert engine.status == "draining"
        with pytest.raises(NotReady, match="draining"):
            engine.submit([spec()], "png")
        assert not engine.idle
        sampler.release()
        assert outcome(job) is None
        until(lambda: engine.idle)
    assert engine.status == "stopped"


def test_stop_answers_whoever_still_waits() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        jobs = [engine.submit([spec(steps=1000)] * 4, "png") for _ in range(3)]
        assert sampler.entered.acquire(timeout=WAIT_S)
        assert not engine.stop(join_timeout_s=0)  # a step is under way
        assert all(isinstance(outcome(job), NotReady) for job in jobs)
        sampler.release()
        assert engine.stop(join_timeout_s=WAIT_S)


def test_stop_waits_for_a_decoder_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, decoding, gate = WatchedSampler(), threading.Event(), threading.Event()
    decode = sampler.decode

    def slow(row: FakeRow) -> np.ndarray:
        decoding.set()
        assert gate.wait(WAIT_S)
        return decode(row)

    with running_engine(sampler) as engine:
        monkeypatch.setattr(sampler, "decode", slow)
        job = engine.submit([spec()], "png")
        assert decoding.wait(WAIT_S)
        assert not engine.stop(join_timeout_s=0)
        assert isinstance(outcome(job), NotReady)
        threading.Timer(0.05, gate.set).start()
        assert engine.stop(join_timeout_s=WAIT_S)


def test_a_stalled_step_shows_and_passes() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler, stall_timeout_s=0.05) as engine:
        sampler.hold()
        job = engine.submit([spec()], "png")
        until(lambda: engine.status == "stalled")
        with pytest.raises(NotReady, match="stalled"):
            engine.submit([spec()], "png")
        sampler.release()
        assert outcome(job) is None
        until(lambda: engine.status == "ready")


def test_a_dead_loop_is_restarted_and_what_waits_is_kept() -> None:
    sampler = WatchedSampler()

    def die(rows: Sequence[FakeRow]) -> None:
        if any(row.spec.seed == 13 for row in rows):
            raise SystemExit("gone")

    with running_engine(sampler, max_batch_rows=2) as engine:
        sampler.hold()
        sampler.on_step = die
        fatal = engine.submit([spec(seed=13)], "png")
        beside = engine.submit([spec(seed=1)], "png")
        assert sampler.entered.acquire(timeout=WAIT_S)
        waiting = [engine.submit([spec(seed=s)], "png") for s in (2, 3)]
        sampler.release()
        assert isinstance(outcome(fatal), GenerationFailed)
        assert outcome(beside) is None or isinstance(outcome(beside), GenerationFailed)
        assert [outcome(job) for job in waiting] == [None, None]
        assert engine.status == "ready"


def test_a_loop_that_dies_again_and_again_fails_and_strands_nobody() -> None:
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:

        def die(rows: object) -> None:
            raise SystemExit("gone")

        sampler.on_step = die
        for _ in range(MAX_RESTARTS):
            assert isinstance(outcome(engine.submit([spec()], "png")), GenerationFailed)
        last = engine.submit([spec()], "png")
        assert isinstance(outcome(last), GenerationFailed)
        until(lambda: engine.status == "failed")
        assert isinstance(engine.failure, SystemExit)
        with pytest.raises(NotReady, match="failed"):
            engine.submit([spec()], "png")


def test_our_own_fault_in_the_loop_costs_one_batch_not_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(WatchedSampler()) as engine:
        monkeypatch.setattr(engine._replicas[0].stepper, "step", lambda *_: 1 / 0)
        assert isinstance(outcome(engine.submit([spec()], "png")), GenerationFailed)
        monkeypatch.undo()
        assert outcome(engine.submit([spec()], "png")) is None


def test_warm_up_comes_before_ready_and_its_failure_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.warm_up.QUICK_S", float("inf"))  # a size is run twice though it was held
    sampler = WatchedSampler()
    engine = create_engine([sampler], make_settings())
    sampler.hold()
    engine.start()
    until(lambda: len(sampler.batches) == 1)
    with pytest.raises(NotReady, match="starting"):
        engine.submit([spec()], "png")
    sampler.release()
    until(lambda: engine.status == "ready")
    assert [len(batch) for batch in sampler.batches] == [1, 1, 2, 2]  # 1 and 4 rows, twice; guided images take 2
    engine.stop()

    sampler = WatchedSampler()
    sampler.faulty_seeds = {0}
    engine = create_engine([sampler], make_settings())
    engine.start()
    until(lambda: engine.status == "failed")
    assert isinstance(engine.failure, RuntimeError)


def test_many_requests_from_many_threads_leave_nothing_behind() -> None:
    sampler = WatchedSampler()
    outcomes: list[bool] = []
    with running_engine(sampler, max_queue_images=1000) as engine:

        def client(number: int) -> None:
            for i in range(20):
                job = engine.submit([spec(seed=number * 100 + i, steps=1 + i % 3)] * (1 + i % 2), "png")
                if i % 3 == 0:
                    engine.cancel(job)
                outcomes.append(isinstance(outcome(job), Cancelled | None))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert outcomes == [True] * 160
        until(lambda: engine.idle and engine.images_decoding == 0)
        assert sample(engine, "robuq_requests_running") == sample(engine, "robuq_requests_waiting") == 0
        assert engine._ledger.rows_to_step == engine._generation.jobs == 0
    assert max(map(len, sampler.batches)) <= 4
