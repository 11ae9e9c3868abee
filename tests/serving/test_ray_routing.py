"""The choice of replicas by itself; tests/serving/test_ray_app.py has Ray make it."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

import pytest

pytest.importorskip("ray.serve")

from ray.serve.request_router import PendingRequest

from server.ray_support import TwoChoices


def chosen(candidates: list[str]) -> list[list[str]]:
    router = TwoChoices.__new__(TwoChoices)  # whose state is of no matter here, and needs a cluster
    return asyncio.run(router.choose_replicas(candidates))  # type: ignore[arg-type]


def test_all_replicas_are_drawn_and_no_one_twice() -> None:
    seen = set()
    for _ in range(200):
        (pair,) = chosen(["near", "far", "farther"])
        assert len(set(pair)) == 2
        seen.update(pair)
    assert seen == {"near", "far", "farther"}


def test_ray_waits_between_tries_while_all_are_full() -> None:
    async def tries() -> int:
        router = TwoChoices.__new__(TwoChoices)
        waits: list[int] = []

        async def backoff(attempt: int) -> None:
            waits.append(attempt)

        full = {
            "_replicas": {"near": None, "far": None},
            "_replicas_list": ["near", "far"],
            "num_routing_tasks_in_backoff": 0,
            "num_routing_tasks_in_backoff_gauge": MagicMock(),
            "_backoff": backoff,
        }
        for name, value in full.items():
            setattr(router, name, value)
        pending = PendingRequest(args=[], kwargs={}, metadata=MagicMock())
        choosing = router._choose_replicas_with_backoff(pending)
        for _ in range(5):
            assert len(await anext(choosing)) == 2
        await choosing.aclose()
        return len(waits)

    assert asyncio.run(tries()) == 3  # the second try comes at once


def test_one_replica_or_none_is_no_matter() -> None:
    assert chosen(["only"]) == [["only"]]
    assert chosen([]) == [[]]
