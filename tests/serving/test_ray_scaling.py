"""The autoscaling policy by itself: what it asks Ray for, given what Ray would tell it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import ray_support
from server.ray_support import IMAGES, REQUESTS, scale_on_images


def wanted(images: list[float], requests: list[float], queued: float, target: float = 8.0) -> float:
    told = {
        IMAGES: {f"replica {i}": value for i, value in enumerate(images)},
        REQUESTS: {f"replica {i}": value for i, value in enumerate(requests)},
    }
    context = SimpleNamespace(
        aggregated_metrics=told, total_queued_requests=queued, config=SimpleNamespace(target_ongoing_requests=target)
    )
    replicas, state = scale_on_images(context)
    assert state == {}
    return replicas


def test_images_count_and_not_requests() -> None:
    assert wanted([16, 0], [1, 0], 0) == 2
    assert wanted([4, 4], [8, 8], 0) == 1
    assert wanted([], [], 0) == 0


def test_those_at_the_proxies_are_as_large_as_those_in_the_engines() -> None:
    assert wanted([16], [4], 4) == pytest.approx(4)
    assert wanted([], [], 16) == pytest.approx(2)


def test_nothing_told_is_nothing_to_do() -> None:
    context = SimpleNamespace(
        aggregated_metrics=None, total_queued_requests=None, config=SimpleNamespace(target_ongoing_requests=2.0)
    )
    assert scale_on_images(context) == (0.0, {})


@given(st.lists(st.floats(0, 1e4), max_size=8), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.1, 1e3))
def test_more_work_never_asks_for_fewer(images: list[float], queued: float, more: float, target: float) -> None:
    requests = [value / 2 for value in images]
    assert wanted(images, requests, queued + more, target) >= wanted(images, requests, queued, target)
    assert wanted([*images, more], [*requests, more / 2], 0, target) >= wanted(images, requests, 0, target)


def test_ray_can_run_a_copy_without_this_package() -> None:
    tree = ast.parse(Path(ray_support.__file__).read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {module.split(".")[0] for module in modules} <= {
        "__future__",
        "typing",
        "random",
        "prometheus_client",
        "ray",
    }
