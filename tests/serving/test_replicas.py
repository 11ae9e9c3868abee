"""Several replicas behind one queue: they divide the work, and one that is stuck or dead does not hold up the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from server.engine import DeadlineExceeded, GenerationFailed, Overloaded
from server.engine.replica import Replica
from server.loading import load_samplers
from server.scheduler import StepTimeCurve
from serving_harness import WAIT_S, WatchedSampler, make_settings, outcome, running_engine, sample, spec, until

from robuq_core.errors import UserError
from robuq_core.images import encode_image
from server.fake import FakeRow


def hold(samplers: Sequence[WatchedSampler]) -> None:
    for sampler in samplers:
        sampler.hold()


def wait_for_a_step(samplers: Sequence[WatchedSampler]) -> None:
    """Until each has begun another one."""
    for sampler in samplers:
        assert sampler.entered.acquire(timeout=WAIT_S)


def test_a_burst_is_divided_evenly() -> None:
    samplers = [WatchedSampler() for _ in range(2)]
    with running_engine(*samplers, max_batch_rows=8, max_queue_images=64) as engine:
        hold(samplers)
        jobs = [engine.submit([spec(seed=s, steps=10)], "png") for s in range(8)]
        wait_for_a_step(samplers)  # whoever was early has taken less
        for sampler in samplers:
            sampler.permit()
        wait_for_a_step(samplers)
        for sampler in samplers:
            sampler.release()
        assert all(outcome(job) is None for job in jobs)
        for s, job in enumerate(jobs):
            assert job.future.result().images[0] == encode_image(samplers[0].decode(FakeRow(spec(s, 10))), "png")
    # One replica alone would have had room for them all.
    assert [max(map(len, sampler.batches)) for sampler in samplers] == [4, 4]
    assert sum(len(batch) for sampler in samplers for batch in sampler.batches) == 80


@pytest.mark.parametrize("guidance", [(2.0, 2.0, 2.0), (2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 2.0), (1.0,) * 5])
def test_no_image_waits_while_there_is_room_for_it(guidance: tuple[float, ...]) -> None:
    samplers = [WatchedSampler() for _ in range(2)]
    with running_engine(*samplers, max_batch_rows=16) as engine:
        hold(samplers)
        plugs = [engine.submit([spec(seed=100 + i, steps=2)], "png") for i in range(2)]
        wait_for_a_step(samplers)
        jobs = [engine.submit([spec(seed=s, guidance_scale=g)], "png") for s, g in enumerate(guidance)]
        for sampler in samplers:
            sampler.permit()
        wait_for_a_step(samplers)
        assert engine.requests_waiting == 0
        for sampler in samplers:
            sampler.release()
        assert all(outcome(job) is None for job in (*plugs, *jobs))


def test_images_of_one_request_may_run_on_several_replicas() -> None:
    samplers = [WatchedSampler() for _ in range(3)]
    with running_engine(*samplers, max_batch_rows=4) as engine:
        hold(samplers)
        specs = [spec(seed=s, steps=5) for s in range(12)]
        job = engine.submit(specs, "png")
        wait_for_a_step(samplers)
        for sampler in samplers:
            sampler.release()
        result = job.future.result(WAIT_S)
    assert list(result.images) == [encode_image(samplers[0].decode(FakeRow(s)), "png") for s in specs]
    assert result.timings.total_s == pytest.approx(sum(vars(result.timings).values()) - result.timings.total_s)


def test_a_request_begins_with_its_earliest_step_whoever_ends_first() -> None:
    samplers = [WatchedSampler() for _ in range(2)]
    with running_engine(*samplers, max_batch_rows=2) as engine:
        hold(samplers)
        job = engine.submit([spec(seed=s, steps=1, guidance_scale=2) for s in range(2)], "png")
        wait_for_a_step(samplers)
        began = [replica.stepper.step_began or 0.0 for replica in engine._replicas]
        late, early = sorted(range(2), key=began.__getitem__, reverse=True)
        samplers[late].release()
        until(lambda: job.first_step_at is not None)
        samplers[early].release()
        timings = job.future.result(WAIT_S).timings
    assert job.first_step_at is not None
    assert job.first_step_at <= began[early] <= began[late] <= job.last_step_at
    assert timings.inference_s == job.last_step_at - job.first_step_at


def test_a_stuck_replica_leaves_the_rest_ready_and_its_rows_to_their_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, free = WatchedSampler(), WatchedSampler()

    def stall(replica: Replica) -> None:
        """The forward that it is in has been running for long."""
        monkeypatch.setattr(replica.stepper, "_clock", lambda: time.monotonic() + 2 * replica._stall_timeout_s)

    with running_engine(stuck, free) as engine:
        hold([stuck, free])
        jobs = [engine.submit([spec(seed=s, steps=50)], "png", timeout_s=WAIT_S) for s in range(2)]
        wait_for_a_step([stuck, free])
        free.release()
        until(lambda: any(job.future.done() for job in jobs))
        stall(engine._replicas[0])
        assert engine._replicas[0].stalled
        assert engine.status == "ready"
        # What comes now goes to the other one, all of it.
        later = [engine.submit([spec(seed=s)], "png") for s in (7, 8, 9)]
        assert [outcome(job) for job in later] == [None, None, None]
        monkeypatch.setattr(engine._ledger, "clock", lambda: time.monotonic() + WAIT_S)
        assert {type(outcome(job)) for job in jobs} == {type(None), DeadlineExceeded}
        free.hold()
        last = engine.submit([spec(seed=11)], "png")
        assert free.entered.acquire(timeout=WAIT_S)
        stall(engine._replicas[1])
        assert engine.status == "stalled"
        stuck.release()
        free.release()
        assert outcome(last) is None
        until(lambda: engine.status == "ready")


def test_a_dead_replica_costs_its_own_rows_and_comes_back() -> None:
    deadly, healthy = WatchedSampler(), WatchedSampler()

    def die(rows: Sequence[FakeRow]) -> None:
        deadly.on_step = None
        raise KeyboardInterrupt

    with running_engine(deadly, healthy) as engine:
        hold([deadly, healthy])
        jobs = [engine.submit([spec(seed=s)], "png") for s in range(2)]
        wait_for_a_step([deadly, healthy])
        deadly.on_step = die
        deadly.release()
        until(lambda: any(job.future.done() for job in jobs))
        healthy.release()
        assert sorted(str(type(outcome(job)).__name__) for job in jobs) == ["GenerationFailed", "NoneType"]

        def both_work() -> bool:
            assert outcome(engine.submit([spec(seed=s, steps=20) for s in range(8)], "png")) is None
            return len(deadly.batches) > 1

        until(both_work)
        assert sample(engine, "robuq_requests_total", finished_reason="error") == 1


def test_the_wait_that_is_told_shrinks_with_the_number_of_replicas() -> None:
    def told(replicas: int) -> float:
        samplers = [WatchedSampler() for _ in range(replicas)]
        with running_engine(*samplers, max_batch_rows=2) as engine:
            for replica in engine._replicas:
                replica.curve = StepTimeCurve()
                replica.curve.observe(2, 0.03)
            hold(samplers)
            running = engine.submit([spec(steps=100)] * (2 * replicas), "png")
            until(lambda: engine.load().images_waiting == 0)
            engine.submit([spec(steps=100)] * 16, "png")
            with pytest.raises(Overloaded) as refused:
                engine.submit([spec(steps=100)] * 8, "png")
            assert not running.future.done()
            return refused.value.retry_after_s

    # A round that runs and four of two images, 100 steps of 30 ms each; one and one if there are four replicas.
    assert told(1) == pytest.approx(5 * 100 * 0.03)
    assert told(4) == pytest.approx(2 * 100 * 0.03)


def test_no_two_replicas_ever_step_the_same_row() -> None:
    owners: dict[int, str] = {}
    clashes: list[int] = []

    def watch(rows: Sequence[FakeRow]) -> None:
        me = threading.current_thread().name
        for row in rows:
            if owners.setdefault(row.spec.seed, me) != me:
                clashes.append(row.spec.seed)

    samplers = [WatchedSampler(step_s=0.0005, on_step=watch) for _ in range(4)]
    with running_engine(*samplers, max_queue_images=1000) as engine:
        owners.clear()
        clashes.clear()  # of the warm-up
        jobs = []
        for s in range(300):
            jobs.append(engine.submit([spec(seed=s + 100, steps=1 + s % 7)], "png"))
            if s % 5 == 0:
                engine.cancel(jobs[s // 2])
        for job in jobs:
            outcome(job)
        until(lambda: engine.idle and engine.images_decoding == 0)
        assert engine._ledger.rows_to_step == engine._generation.jobs == 0
    assert clashes == []


def test_replicas_divide_the_threads_and_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load_samplers(None, make_settings(replicas=2, threads=4, backend="cpu"))
    assert first.model.backend.threads == second.model.backend.threads == 2  # type: ignore[attr-defined]
    assert first.model.backend is not second.model.backend  # type: ignore[attr-defined]
    ours, theirs = (s.model.blocks[0].qkv.planar.data_ptr() for s in (first, second))  # type: ignore[attr-defined]
    assert ours == theirs
    with pytest.raises(UserError, match="at most 2"):
        load_samplers(None, make_settings(replicas=3, threads=2))


def test_a_faulty_row_on_one_replica_fails_its_own_request_only() -> None:
    samplers = [WatchedSampler() for _ in range(2)]
    for sampler in samplers:
        sampler.faulty_seeds = {7}
    with running_engine(*samplers, max_queue_images=64) as engine:
        jobs = [engine.submit([spec(seed=s), spec(seed=s + 100)], "png") for s in range(12)]
        assert [type(outcome(job)) for job in jobs] == [GenerationFailed if s == 7 else type(None) for s in range(12)]
