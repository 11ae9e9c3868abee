"""Several workers behind one queue, and every fault at once, at random."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from serving_harness import WAIT_S, Engine, Job, WatchedSampler, outcome, running_engine, sample, spec, until

from robuq_core.images import encode_image
from robuq_core.params import RowSpec
from server.fake import FakeRow, FakeSampler
from server.remote_worker import RemoteWorker
from server.request import Cancelled, GenerationFailed, NotReady, Overloaded, WorkerDied


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
        wait_for_a_step(samplers)
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


def test_a_worker_that_hangs_leaves_the_rest_ready_and_its_images_go_there() -> None:
    stuck, free = WatchedSampler(), WatchedSampler(step_s=0.002)
    with running_engine(stuck, free) as engine:
        stuck.hold()
        jobs = [engine.submit([spec(seed=s, steps=50)], "png") for s in range(2)]
        assert stuck.entered.acquire(timeout=WAIT_S)
        assert engine.status == "ready"
        engine.make_stale(0)
        assert [outcome(engine.submit([spec(seed=s)], "png")) for s in (7, 8, 9)] == [None] * 3
        assert [outcome(job) for job in jobs] == [None, None]
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        stuck.release()
        until(lambda: [replica.alive for replica in engine.load().replicas] == [True, True])


def test_a_worker_that_connects_after_the_first_has_loaded_loads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = RemoteWorker.connect

    async def late(worker: RemoteWorker) -> None:
        while worker.number == 1 and worker.fleet.model is None:
            await asyncio.sleep(0.001)
        await connect(worker)

    monkeypatch.setattr(RemoteWorker, "connect", late)
    with running_engine(WatchedSampler(), WatchedSampler()) as engine:
        assert [replica.alive for replica in engine.load().replicas] == [True, True]


def test_the_wait_that_is_reported_shrinks_with_the_number_of_replicas() -> None:
    def reported(replicas: int) -> float:
        samplers = [WatchedSampler() for _ in range(replicas)]
        with running_engine(*samplers, max_batch_rows=2) as engine:
            hold(samplers)
            running = engine.submit([spec(steps=100)] * (2 * replicas), "png")
            wait_for_a_step(samplers)
            for worker in engine.pool._fleet.present:
                worker.rows_per_s = 2 / 0.03
            engine.submit([spec(steps=100)] * 16, "png")
            with pytest.raises(Overloaded) as refused:
                engine.submit([spec(steps=100)] * 8, "png")
            assert not running.future.done()
            return refused.value.retry_after_s

    # What runs and the 16 that wait, in rounds of two images for each replica, 100 steps of 30 ms each.
    assert reported(1) == pytest.approx(9 * 100 * 0.03)
    assert reported(4) == pytest.approx(3 * 100 * 0.03)


REQUESTS = 400
# By the seed of an image: what it does to the sampler.
HARMLESS, STARTLESS, STEPLESS, DECODELESS, DEADLY = range(1000, 1005)  # none that a warm-up uses


class Troubled(FakeSampler):
    """Fails as its rows tell it to, and now and then of its own accord."""

    def __init__(self, seed: int, deaths: threading.Semaphore) -> None:
        super().__init__(step_s=0.0002)
        self._rng = random.Random(seed)
        self._deaths = deaths
        self.calm = True

    def start(self, spec: RowSpec) -> FakeRow:
        if spec.seed == STARTLESS:
            raise ValueError("cannot start")
        return super().start(spec)

    def step(self, rows: Sequence[FakeRow]) -> None:
        if not self.calm and self._rng.random() < 0.05 and len(rows) > 2:
            raise MemoryError
        if not self.calm and self._rng.random() < 0.02 and len(rows) > 1:
            raise RuntimeError("once")
        for row in rows:
            if row.spec.seed == STEPLESS and row.steps_done == 1:
                raise RuntimeError("cannot step")
            if row.spec.seed == DEADLY and self._deaths.acquire(blocking=False):
                raise SystemExit("beyond repair")
        super().step(rows)

    def decode(self, row: FakeRow) -> np.ndarray:
        if row.spec.seed == DECODELESS:
            raise OSError("cannot decode")
        return super().decode(row)


def submit_at_random(engine: Engine, rng: random.Random) -> Job | None:
    kind = rng.choice([STARTLESS, STEPLESS, DECODELESS, DEADLY] + [HARMLESS] * 12)
    spec = RowSpec(rng.randrange(5), kind, rng.randint(2, 9), rng.choice([1.0, 1.0, 2.0]), "ddim")
    try:
        return engine.submit(
            [spec] * rng.randint(1, 3),
            "png",
            client=str(rng.randrange(4)),
            priority=rng.randrange(10),
            preview_every=rng.choice([0, 1, 3]),
            on_event=rng.choice([None, lambda event: None]),
        )
    except (Overloaded, NotReady):  # both workers may be dead at once
        return None


def swapped(engine: Engine, samplers: Sequence[FakeSampler]) -> bool:
    try:
        engine.swap("second", samplers)
    except NotReady:  # both workers are dead just now
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_everyone_is_answered_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    deaths = threading.Semaphore(3)  # of at most six that two workers survive in a minute
    reference = FakeSampler()
    samplers = [Troubled(seed * 10 + i, deaths) for i in range(2)]
    with running_engine(*samplers, max_batch_rows=8, max_queue_images=64, decode_threads=2) as engine:
        jobs: list[Job] = []
        for number in range(REQUESTS):
            for sampler in samplers:
                sampler.calm = False
            job = submit_at_random(engine, rng)
            if job is None:
                if jobs:
                    outcome(jobs[-1])
                until(lambda: engine.status == "ready")  # or most of the requests would fall into a restart
                continue
            jobs.append(job)
            if rng.random() < 0.3:
                engine.cancel(rng.choice(jobs[-10:]), rng.choice(["cancelled", "timeout"]))
            if number == REQUESTS // 2:
                for sampler in samplers:
                    sampler.calm = True  # the warm-up runs beside them
                samplers = [Troubled(seed * 10 + 5 + i, deaths) for i in range(2)]
                until(lambda samplers=samplers: swapped(engine, samplers))  # type: ignore[misc]
        kinds = dict.fromkeys((type(None), Cancelled, GenerationFailed, WorkerDied, Overloaded), 0)
        for job in jobs:
            error = outcome(job)
            kinds[type(error)] += 1
            if error is None:
                assert job.request.specs[0].seed in (HARMLESS, DEADLY)
                assert set(job.future.result(WAIT_S).images) == {
                    encode_image(reference.decode(FakeRow(job.request.specs[0])), "png")
                }
        displaced = kinds.pop(Overloaded)  # may be 0, as those whose worker died twice
        kinds.pop(WorkerDied)
        assert all(kinds.values()), kinds
        until(lambda: engine.images_decoding == 0)
        assert engine.idle
        load = engine.load()
        assert load.requests_running == load.requests_waiting == load.images_in_flight == load.images_waiting == 0
        assert [replica.rows for replica in load.replicas] == [0, 0]
        reasons = ("completed", "cancelled", "timeout", "error")
        assert sum(sample(engine, "robuq_requests_total", finished_reason=r) for r in reasons) == len(jobs) - displaced
        assert sample(engine, "robuq_requests_total", finished_reason="displaced") == displaced
        until(lambda: engine.status == "ready")
