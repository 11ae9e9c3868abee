"""Progress and previews: what a listener gets, and that it can hurt nobody."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from serving_harness import WAIT_S, Engine, WatchedSampler, outcome, running_engine, spec, until

from robuq_core.images import encode_image
from server.request import Event, EventBuffer


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
        assert [e for e in events if e.preview] == []
        assert len([e for e in events if not e.preview]) == 50
        gate.set()
        until(lambda: previews_are_sent(engine))
