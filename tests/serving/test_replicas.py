"""Several workers behind one queue: they divide the work, and one that hangs or dies does not hold up the rest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, sample, spec, until

from robuq_core.images import encode_image
from server.fake import FakeRow
from server.request import Overloaded


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
