"""Progress and previews: what a listener gets, and that it can hurt nobody."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, spec, until

from server.engine import Preview, StepDone
from server.engine.events import Event
from robuq_core.images import encode_image


def test_every_step_is_told_and_every_second_one_but_the_last_is_shown() -> None:
    sampler = WatchedSampler()
    events: list[Event] = []
    specs = [spec(seed=5, steps=6), spec(seed=6, steps=3)]
    with running_engine(sampler) as engine:
        sampler.hold()
        job = engine.submit(specs, "webp", preview_every=2, on_event=events.append)
        for _ in range(6):
            assert sampler.entered.acquire(timeout=WAIT_S)
            until(lambda: engine.images_decoding == 0)  # else a preview is left out
            sampler.permit()
        assert outcome(job) is None
    for image, of in enumerate(specs):
        steps = [e for e in events if isinstance(e, StepDone) and e.image == image]
        assert steps == [StepDone(image, i, of.steps) for i in range(1, of.steps + 1)]
        previews = [e for e in events if isinstance(e, Preview) and e.image == image]
        assert [e.steps_done for e in previews] == list(range(2, of.steps, 2))
        for e in previews:
            assert e.steps == of.steps
            assert e.encoded == encode_image(sampler.decode_estimate((of, e.steps_done)), "webp")


def test_without_a_listener_nothing_is_estimated() -> None:
    sampler = WatchedSampler()
    sampler.estimate = lambda row: pytest.fail("estimated")  # type: ignore[method-assign]
    with running_engine(WatchedSampler()) as engine:
        engine._generation.samplers[0].estimate = sampler.estimate  # type: ignore[method-assign]
        assert outcome(engine.submit([spec()], "png", preview_every=1)) is None


def test_a_listener_that_raises_is_dropped_and_its_request_completes(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Event] = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("no listener")

    heard: list[Event] = []
    with running_engine(WatchedSampler()) as engine:
        bad = engine.submit([spec(seed=1, steps=5)], "png", preview_every=1, on_event=broken, request_id="mine")
        good = engine.submit([spec(seed=2, steps=5)], "png", on_event=heard.append)
        assert outcome(bad) is None
        assert outcome(good) is None
    assert len(calls) == 1
    assert heard == [StepDone(0, i, 5) for i in range(1, 6)]
    assert [record.request_id for record in caplog.records if "listener" in record.message] == ["mine"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["estimate", "decode_estimate"])
def test_a_preview_that_fails_costs_nothing_but_itself(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WatchedSampler()
    events: list[Event] = []
    with running_engine(sampler) as engine:

        def broken(argument: object) -> object:
            raise RuntimeError("no preview")

        monkeypatch.setattr(sampler, stage, broken)
        assert outcome(engine.submit([spec(steps=4)], "png", preview_every=1, on_event=events.append)) is None
        until(lambda: engine.images_decoding == 0)
    assert events == [StepDone(0, i, 4) for i in range(1, 5)]


def test_slow_previews_are_left_out_and_hold_no_step_up() -> None:
    sampler = WatchedSampler()
    gate = threading.Event()

    def slow(estimate: object) -> np.ndarray:
        assert gate.wait(WAIT_S)
        return np.zeros((4, 4, 3), np.uint8)

    sampler.decode_estimate = slow  # type: ignore[method-assign]
    events: list[Event] = []
    gate.set()
    with running_engine(sampler, decode_threads=2) as engine:
        gate.clear()
        job = engine.submit([spec(steps=50)], "png", preview_every=1, on_event=events.append)
        assert outcome(job) is None  # one decoder is stuck in its first preview
        assert [e for e in events if isinstance(e, Preview)] == []
        assert len([e for e in events if isinstance(e, StepDone)]) == 50
        gate.set()
        until(lambda: engine.images_decoding == 0)


def test_previews_of_an_image_come_in_order() -> None:
    sampler = WatchedSampler(step_s=0.001)
    events: list[Event] = []

    def shown() -> list[int]:
        return [e.steps_done for e in list(events) if isinstance(e, Preview)]

    with running_engine(sampler, decode_threads=4) as engine:
        sampler.hold()
        jobs = [
            engine.submit([spec(seed=s, steps=40)], "png", preview_every=1, on_event=events.append if s == 0 else None)
            for s in range(4)
        ]
        sampler.permit()
        until(lambda: shown() == [1])
        sampler.release()
        assert all(outcome(job) is None for job in jobs)
        until(lambda: engine.images_decoding == 0)
    assert shown() == sorted(set(shown()))
