"""The pool: batching at step level, what bounds a batch, faults and deaths, progress and previews."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from serving_harness import (
    WAIT_S,
    Engine,
    ThreadHandle,
    WatchedSampler,
    after,
    outcome,
    running_engine,
    sample,
    spec,
    started_engine,
    until,
)

from robuq_core.images import encode_image
from server.fake import FakeRow
from server.fleet import MAX_DEATHS
from server.remote_worker import RunFailed
from server.request import Event, EventBuffer, GenerationFailed, NotReady, WorkerDied
from server.settings import Settings


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


def test_an_image_is_sent_when_it_is_done_though_others_have_quick_steps_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.QUIET_S", float("inf"))
    sampler = WatchedSampler()
    with running_engine(sampler) as engine:
        sampler.hold()
        engine.submit([spec(seed=1, steps=100)])
        assert sampler.entered.acquire(timeout=WAIT_S)
        short = engine.submit([spec(seed=2, steps=2)])
        sampler.permit(3)
        assert outcome(short) is None  # while the next step of the other image is held


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
    with running_engine(sampler, max_batch_rows=2, max_queue_images=64) as engine:
        sampler.decode = after(gate, sampler.decode)  # type: ignore[method-assign]
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


@pytest.mark.parametrize(("failures", "status"), [(MAX_DEATHS - 1, "ready"), (MAX_DEATHS, "failed")])
def test_a_process_that_cannot_be_started_counts_as_a_death(
    failures: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.fleet.FIRST_PAUSE_S", 0.0)
    faults = [OSError(errno.ENOMEM, "no memory")] * failures
    with running_engine(WatchedSampler()) as engine:

        def launch(settings: Settings, weights: int) -> ThreadHandle:
            if faults:
                raise faults.pop()
            return engine.launcher(settings, weights)

        monkeypatch.setattr(engine.pool, "_launch", launch)
        engine.kill()
        until(lambda: not faults and engine.status == status)
        assert ("no memory" in str(engine.failure)) == (status == "failed")


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
    sampler, hanging, gate = WatchedSampler(step_s=0.01), threading.Event(), threading.Event()
    decode = sampler.decode

    def hang_once(row: FakeRow) -> np.ndarray:
        if row.spec.seed == 7 and not hanging.is_set():
            hanging.set()
            assert gate.wait(WAIT_S)
        return decode(row)

    with running_engine(sampler) as engine:
        monkeypatch.setattr(sampler, "decode", hang_once)
        long = engine.submit([spec(seed=1, steps=100)], "png")
        stuck = engine.submit([spec(seed=7)], "png")
        assert hanging.wait(WAIT_S)
        engine.make_stale(stage="decode")
        assert [outcome(stuck), outcome(long)] == [None, None]  # by the worker that replaced the first one
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        gate.set()


def test_a_decoder_with_many_images_before_it_does_not_count_as_hung() -> None:
    sampler, permits = WatchedSampler(), threading.Semaphore(0)
    decode = sampler.decode

    def slow(row: FakeRow) -> np.ndarray:
        assert permits.acquire(timeout=WAIT_S)
        return decode(row)

    with running_engine(sampler) as engine:
        sampler.decode = slow  # type: ignore[method-assign]
        first, second = (engine.submit([spec(seed=seed)]) for seed in range(2))
        until(lambda: engine.images_decoding == 2)
        (worker,) = engine.pool._fleet.present  # type: ignore[union-attr]

        def wait_for_long() -> None:
            worker.sent[list(worker.decoding)[1]].leaving_at -= 10_000

        engine.call(wait_for_long)
        permits.release()
        assert outcome(first) is None
        assert engine.call(lambda: worker.hung(engine.pool.clock())) == ""
        permits.release()
        assert outcome(second) is None


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


def model_rows(rows: Sequence[FakeRow]) -> int:
    return sum(2 if row.guided else 1 for row in rows)


class SmallCard(WatchedSampler):
    """Has memory for ``room`` rows of the model."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        return tuple(sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows}))

    def step(self, rows: Sequence[FakeRow]) -> None:
        self.sizes.append(model_rows(rows))
        if self.sizes[-1] > self.room:
            raise MemoryError
        super().step(rows)


def test_when_memory_runs_out_every_request_completes_and_the_budget_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.stepping.GROW_AFTER", 8)
    card = SmallCard(room=64)
    with running_engine(card, max_batch_rows=16, max_queue_images=256) as engine:
        card.room = 5
        card.hold()
        specs = [spec(seed=s, steps=4, guidance_scale=1.0 + s % 2) for s in range(60)]
        jobs = [engine.submit(specs[:1], "png")]
        assert card.entered.acquire(timeout=WAIT_S)
        jobs += [engine.submit([later], "png") for later in specs[1:]]
        card.release()
        for of, job in zip(specs, jobs, strict=True):
            assert job.future.result(WAIT_S).images == (encode_image(card.decode(FakeRow(of)), "png"),)
        failures = [size for size in card.sizes if size > 5]
        assert len(failures) < 40  # it learns, rather than fail at every step
        # Half of what did not fit, or grown until the next step is to find that it does not: images of two rows may
        # leave a row of the budget empty.
        assert 3 <= engine.load().replicas[0].row_budget <= card.room + 2
        assert sample(engine, "robuq_requests_total", finished_reason="error") == 0
        card.room = 64
        card.step_s = 0.001  # for the pool to hear of the room in time
        card.sizes.clear()

        def runs_at_once() -> int:
            assert outcome(engine.submit([spec(seed=s, steps=200) for s in range(16)], "png")) is None
            return max(card.sizes)

        until(lambda: runs_at_once() == 16)


def test_a_warm_up_beyond_the_memory_serves_what_fits() -> None:
    card = SmallCard(room=7)
    with running_engine(card, max_batch_rows=32) as engine:
        assert max(card.sizes) == 8  # 16 and 32 were not even tried
        card.sizes.clear()
        assert outcome(engine.submit([spec(seed=s) for s in range(16)], "png")) is None
        assert max(card.sizes) == 4


def test_a_target_for_the_step_keeps_batches_small() -> None:
    """An image of two rows runs even if it is above the target."""
    sampler = SmallCard(room=64)
    sampler.on_step = lambda rows: time.sleep(0.001)
    with running_engine(sampler, max_batch_rows=16, max_queue_images=64, target_step_s=0.0001) as engine:
        sampler.sizes.clear()
        assert outcome(engine.submit([spec(seed=s, steps=3, guidance_scale=2.0) for s in range(12)], "png")) is None
        assert max(sampler.sizes) == 2


def previews_are_sent(engine: Engine) -> bool:
    """No decoder has anything to do."""
    return all(handle.worker._previews == 0 for handle in engine.launcher.handles)


def test_every_step_is_told_and_every_second_one_but_the_last_is_shown() -> None:
    sampler = WatchedSampler()
    events: list[Event] = []
    specs = [spec(seed=5, steps=6), spec(seed=6, steps=3)]
    with running_engine(sampler) as engine:
        sampler.hold()
        job = engine.submit(specs, "webp", preview_every=2, on_event=events.append)
        for _ in range(6):
            assert sampler.entered.acquire(timeout=WAIT_S)
            until(lambda: previews_are_sent(engine))  # else a preview is skipped
            sampler.permit()
        assert outcome(job) is None
    for image, of in enumerate(specs):
        steps = [e for e in events if not e.preview and e.image == image]
        assert steps == [Event(image, i, of.steps) for i in range(1, of.steps + 1)]
        previews = [e for e in events if e.preview and e.image == image]
        assert [e.steps_done for e in previews] == list(range(2, of.steps, 2))
        for e in previews:
            assert e.steps == of.steps
            assert e.preview == encode_image(sampler.decode_estimate((of, e.steps_done)), "webp")


def test_a_slow_reader_gets_the_latest_of_each_image() -> None:
    async def read() -> list[Event]:
        buffer = EventBuffer()
        for steps_done in range(1, 6):
            for image in range(2):
                buffer.put(Event(image, steps_done, 5))
        buffer.put(Event(0, 4, 5, b"x"))
        await buffer.wait()
        return buffer.take()

    assert asyncio.run(read()) == [Event(0, 5, 5), Event(1, 5, 5), Event(0, 4, 5, b"x")]


@pytest.mark.parametrize("stage", ["estimate", "decode_estimate"])
def test_a_preview_that_fails_costs_nothing_but_itself(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WatchedSampler()
    events: list[Event] = []
    with running_engine(sampler) as engine:

        def broken(argument: object) -> object:
            raise RuntimeError("no preview")

        monkeypatch.setattr(sampler, stage, broken)
        assert outcome(engine.submit([spec(steps=4)], "png", preview_every=1, on_event=events.append)) is None
        until(lambda: previews_are_sent(engine))
    assert events == [Event(0, i, 4) for i in range(1, 5)]


def test_slow_previews_are_left_out_and_hold_no_step_up() -> None:
    sampler = WatchedSampler()
    gate = threading.Event()
    sampler.decode_estimate = after(gate, sampler.decode_estimate)  # type: ignore[method-assign]
    events: list[Event] = []
    with running_engine(sampler, decode_threads=2) as engine:
        job = engine.submit([spec(steps=50)], "png", preview_every=1, on_event=events.append)
        assert outcome(job) is None  # one decoder is stuck in its first preview
        assert [e for e in events if e.preview] == []
        assert len([e for e in events if not e.preview]) == 50
        gate.set()
        until(lambda: previews_are_sent(engine))
