"""The choice of replicas by itself; tests/server/test_ray_app.py has Ray make it."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("ray.serve")

from server.ray_routing import TwoChoices


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


def test_one_replica_or_none_is_no_matter() -> None:
    assert chosen(["only"]) == [["only"]]
    assert chosen([]) == [[]]
