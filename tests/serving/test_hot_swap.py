"""Another checkpoint in a running engine: no request is lost, and each is drawn by the model it was submitted to."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from server.collector import settle
from server.engine import NotReady
from server.engine.create import create_engine
from server.loading import load_samplers
from serving_harness import WAIT_S, WatchedSampler, make_settings, outcome, running_engine, spec, until
from tiny import write_tiny

from robuq_core.errors import TooSlowError
from robuq_core.images import encode_image
from server.fake import FakeRow


class Checkpoint(WatchedSampler):
    """Draws every row in the colour of its version."""

    def __init__(self, version: int, **options: object) -> None:
        super().__init__(**options)
        self.version = version
        self.checkpoint_name = f"version-{version}"

    def decode(self, row: FakeRow) -> np.ndarray:
        return np.full((4, 4, 3), self.version, np.uint8)

    def picture(self) -> bytes:
        return encode_image(np.full((4, 4, 3), self.version, np.uint8), "png")


@pytest.fixture
def released_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swapped model stays for whoever read it, however long ago."""
    monkeypatch.setattr("server.engine.supervisor.RELEASE_AFTER_S", WAIT_S)


@pytest.mark.usefixtures("released_late")
def test_requests_in_flight_end_on_the_old_model_and_new_ones_meet_the_new() -> None:
    old, new = Checkpoint(1), Checkpoint(2)
    with running_engine(old, max_batch_rows=2) as engine:
        assert engine.sampler is old
        old.hold()
        running = engine.submit([spec(seed=1, steps=3), spec(seed=2, steps=3)], "png")
        waiting = engine.submit([spec(seed=3)], "png")
        assert old.entered.acquire(timeout=WAIT_S)
        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(engine.swap, [new])
            old.release()
            swapping.result(WAIT_S)
        assert engine.sampler is new
        new.batches.clear()
        after = engine.submit([spec(seed=4)], "png")
        read_before = engine.submit([spec(seed=5)], "png", sampler=old)
        for job, version in ((running, old), (waiting, old), (after, new), (read_before, old)):
            assert set(job.future.result(WAIT_S).images) == {version.picture()}
        assert {seed for batch in new.batches for seed, _ in batch} == {4}
        info = {"version": "0.1.0", "checkpoint": "version-2", "backend": "fake", "avg_activation_bits": "2",
                "decoder": "pixels"}  # fmt: skip
        assert engine.metrics.registry.get_sample_value("robuq_info", info) == 1


@pytest.mark.usefixtures("released_late")
def test_swaps_under_load_lose_nothing_and_mix_nothing_up() -> None:
    stop = threading.Event()
    wrong: list[str] = []
    done = [0] * 4

    def client(number: int) -> None:
        while not stop.is_set():
            sampler = engine.sampler
            assert isinstance(sampler, Checkpoint)
            job = engine.submit([spec(seed=number, steps=1 + number)] * (1 + number % 2), "png", sampler=sampler)
            if set(job.future.result(WAIT_S).images) != {sampler.picture()}:
                wrong.append(sampler.checkpoint_name)
            done[number] += 1

    with running_engine(Checkpoint(0), Checkpoint(0), max_queue_images=64) as engine:
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            for version in range(1, 6):
                engine.swap([Checkpoint(version), Checkpoint(version)])
                before = list(done)
                until(lambda before=before: all(now > then for now, then in zip(done, before, strict=True)))  # type: ignore[misc]
            stop.set()
            for future in clients:
                future.result(WAIT_S)
        assert wrong == []
        assert engine.idle
        assert engine.metrics.registry.get_sample_value(
            "robuq_requests_total", {"finished_reason": "completed"}
        ) == sum(done)


def test_the_old_model_is_released_when_its_last_request_has_ended() -> None:
    engine = create_engine([Checkpoint(1, step_s=0.001)], make_settings())
    seen = weakref.ref(engine.sampler)
    engine.start()
    try:
        until(lambda: engine.status == "ready")
        job = engine.submit([spec(steps=10**6)], "png")
        engine.swap([Checkpoint(2)])
        gc.collect()
        assert not job.future.done()
        assert seen() is not None
        engine.cancel(job)

        def gone() -> bool:
            gc.collect()
            return seen() is None

        until(gone)  # though the job that has ended is still held
        # Whoever comes with it later than a moment is told so.
        with pytest.raises(NotReady, match="starting"):
            engine.submit([spec()], "png", sampler=Checkpoint(1))
        assert outcome(engine.submit([spec()], "png")) is None
    finally:
        engine.stop()


def test_a_model_that_fails_in_its_warm_up_changes_nothing() -> None:
    old, broken = Checkpoint(1), Checkpoint(2)
    broken.faulty_seeds = {0}
    with running_engine(old) as engine:
        with pytest.raises(RuntimeError, match="secret"):
            engine.swap([broken])
        assert engine.sampler is old
        assert engine.status == "ready"
        assert set(engine.submit([spec()], "png").future.result(WAIT_S).images) == {old.picture()}
        engine.swap([Checkpoint(3)])
        assert engine.sampler.checkpoint_name == "version-3"


def test_a_model_whose_warm_up_kills_the_loop_changes_nothing() -> None:
    old, deadly = Checkpoint(1), Checkpoint(2)

    def die(rows: object) -> None:
        raise SystemExit

    deadly.on_step = die
    with running_engine(old) as engine:
        with pytest.raises(SystemExit):
            engine.swap([deadly])
        assert engine.sampler is old
        assert outcome(engine.submit([spec()], "png")) is None


def test_a_swap_needs_a_serving_engine_and_a_sampler_a_replica() -> None:
    with running_engine(Checkpoint(1), Checkpoint(1)) as engine:
        with pytest.raises(ValueError, match="2 replica"):
            engine.swap([Checkpoint(2)])
        engine.begin_drain()
        with pytest.raises(NotReady, match="draining"):
            engine.swap([Checkpoint(2), Checkpoint(2)])
    engine = create_engine([Checkpoint(1)], make_settings())
    with pytest.raises(NotReady, match="starting"):
        engine.swap([Checkpoint(2)])


def test_a_model_that_hangs_in_its_warm_up_is_given_up() -> None:
    old, hanging = Checkpoint(1), Checkpoint(2)
    with running_engine(old, stall_timeout_s=0.1) as engine:
        hanging.hold()
        with pytest.raises(NotReady, match="stalled"):
            engine.swap([hanging])
        hanging.release()
        until(lambda: engine.status == "ready")
        engine._replicas[0]._stall_timeout_s = WAIT_S
        assert engine.sampler is old
        assert outcome(engine.submit([spec()], "png")) is None
        assert len(hanging.batches) <= 2  # the first size's; the second one was not run any more
        engine.swap([Checkpoint(3)])


def test_a_forward_of_a_warm_up_has_a_limit_and_the_old_model_stays() -> None:
    """Without one a swap to a model with too many tokens would keep the replica for hours."""

    class Slow(Checkpoint):
        limits: ClassVar[list[float | None]] = []

        def step(self, rows: Sequence[FakeRow]) -> None:
            self.limits.append(self.forward_limit_s)
            if self.forward_limit_s is not None and len(rows) > 1:
                raise TooSlowError(f"takes longer than {self.forward_limit_s:g} s")
            super().step(rows)

    slow, old = Slow(2), Slow(1)
    with running_engine(old, stall_timeout_s=2 * WAIT_S) as engine:
        assert set(Slow.limits) == {None}, "at the start nobody waits"
        Slow.limits.clear()
        with pytest.raises(TooSlowError):
            engine.swap([slow])
        assert set(Slow.limits) == {WAIT_S}
        assert slow.forward_limit_s is None
        assert engine.sampler is old
        assert outcome(engine.submit([spec()], "png")) is None


def test_stopping_ends_a_swap() -> None:
    old, slow = Checkpoint(1), Checkpoint(2)
    with running_engine(old) as engine, ThreadPoolExecutor(1) as pool:
        slow.hold()
        swapping = pool.submit(engine.swap, [slow])
        assert slow.entered.acquire(timeout=WAIT_S)
        engine.stop(join_timeout_s=0)
        assert isinstance(swapping.exception(WAIT_S), NotReady)
        slow.release()


def test_a_real_model_is_freed_though_the_collector_had_been_told_to_leave_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    engine = create_engine(load_samplers(path, make_settings()), make_settings())
    model = weakref.ref(engine.sampler.model)  # type: ignore[attr-defined]
    settle()
    try:
        engine.start()
        until(lambda: engine.status == "ready")
        assert outcome(engine.submit([spec(steps=2, guidance_scale=1.5)], "png")) is None
        engine._delivery._pool.submit(int).result(WAIT_S)  # the one decoder has let go of it
        engine.swap(load_samplers(path, make_settings()))
        until(lambda: model() is None)
        assert outcome(engine.submit([spec(steps=2)], "png")) is None
    finally:
        gc.unfreeze()
        engine.stop()
