"""Swaps close upon each other, and replicas that die beside them: no swap is lost, none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_harness import WAIT_S, WatchedSampler, make_settings, outcome, running_engine, spec, until

from server.engine import Engine
from server.engine.create import create_engine
from server.fake import FakeRow
from server.engine.supervisor import Supervisor
from server.engine.warm_up import WarmUp

DEADLY = 1000  # a seed that no warm-up uses


def die(rows: Sequence[FakeRow]) -> None:
    if any(row.spec.seed == DEADLY for row in rows):
        raise SystemExit("beyond repair")


def delayed(method: Callable[..., Any], until_set: threading.Event) -> Callable[..., Any]:
    def late(*arguments: Any) -> Any:
        assert until_set.wait(WAIT_S)
        return method(*arguments)

    return late


def is_warming(engine: Engine, sampler: WatchedSampler) -> bool:
    return any(replica.warm_up and replica.warm_up.sampler is sampler for replica in engine._replicas)


def test_a_swap_after_one_that_failed_elsewhere_waits_for_the_forward_under_way() -> None:
    broken, slow, good = WatchedSampler(), WatchedSampler(), [WatchedSampler(), WatchedSampler()]
    broken.faulty_seeds = {0}
    for sampler in (broken, slow):
        sampler.hold()
    with ThreadPoolExecutor(1) as pool, running_engine(WatchedSampler(), WatchedSampler()) as engine:
        failing = pool.submit(engine.swap, [broken, slow])
        assert slow.entered.acquire(timeout=WAIT_S)
        broken.release()
        assert isinstance(failing.exception(WAIT_S), RuntimeError)
        swapping = pool.submit(engine.swap, good)
        until(lambda: is_warming(engine, good[1]))
        slow.release()
        swapping.result(WAIT_S)
        assert engine.sampler is good[0]


def test_a_swap_that_begins_as_the_one_before_ends_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    advance = WarmUp.advance

    def advance_and_rest(warm_up: WarmUp, *arguments: Any) -> None:
        advance(warm_up, *arguments)
        if warm_up.sampler is first and warm_up.ended:
            assert told.wait(WAIT_S)

    first, second = WatchedSampler(), WatchedSampler()
    monkeypatch.setattr(WarmUp, "advance", advance_and_rest)
    with ThreadPoolExecutor(1) as pool, running_engine(WatchedSampler()) as engine:
        engine.swap([first])
        swapping = pool.submit(engine.swap, [second])
        until(lambda: is_warming(engine, second))
        told.set()
        swapping.result(WAIT_S)
        assert engine.sampler is second


def test_a_death_before_a_swap_is_not_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    buried = threading.Event()
    monkeypatch.setattr(Supervisor, "_revive", delayed(Supervisor._revive, buried))
    old, new = WatchedSampler(on_step=die), WatchedSampler()
    with ThreadPoolExecutor(1) as pool, running_engine(old) as engine:
        job = engine.submit([spec(seed=DEADLY)], "png")
        until(lambda: engine._replicas[0].dead)
        swapping = pool.submit(engine.swap, [new])
        until(lambda: is_warming(engine, new))
        buried.set()
        swapping.result(WAIT_S)
        assert engine.sampler is new
        assert outcome(job) is not None
        assert outcome(engine.submit([spec()], "png")) is None


def test_a_replica_that_is_about_to_live_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine([WatchedSampler()], make_settings())
    replica = engine._replicas[0]
    seen: list[bool] = []
    start = threading.Thread.start

    def watched_start(thread: threading.Thread) -> None:
        seen.append(replica.dead)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", watched_start)
    replica.start()
    assert engine.stop(WAIT_S)
    assert seen == [False]
