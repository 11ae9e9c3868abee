"""What the server gives to Ray, without a cluster: its series, against those of /metrics, and how many replicas."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray.serve")

from robuq_core.config import SamplerConfig
from server import ray_support
from server.metrics import Metrics
from server.ray_support import IMAGES, REQUESTS, RayMetrics, scale_on_images
from server.request import ModelInfo


class Gauge:
    """Ray's, as far as it is used: refuses labels that were not announced, and its own."""

    made: ClassVar[dict[str, Gauge]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.made, "Ray would take a second one of that name for another series"
        assert description
        assert not {"deployment", "replica", "application"} & set(tag_keys)
        self.made[name] = self
        self.tag_keys = tag_keys
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(sorted(tags.items()))] = value


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gauge]:
    monkeypatch.setattr(Gauge, "made", {})
    monkeypatch.setattr(ray_support, "Gauge", Gauge)
    return Gauge.made


def test_every_sample_is_published_as_it_is(found: dict[str, Gauge]) -> None:
    metrics = Metrics(max_batch_rows=4)
    metrics.watch("requests_running", lambda: 2)
    metrics.watch("requests_waiting", lambda: 3)
    metrics.requests.labels("completed").inc(5)
    bridge = RayMetrics(metrics.registry)
    bridge.publish()
    metrics.requests.labels("cancelled").inc()
    metrics.observe_step(4, 0.02)
    bridge.publish()
    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "resident" not in sample.name  # which has moved on
    }
    seen = {
        (name, labels): value
        for name, gauge in found.items()
        for labels, value in gauge.values.items()
        if "resident" not in name
    }
    assert seen == expected
    assert seen["robuq_requests_waiting", ()] == 3
    assert seen["robuq_batch_rows_bucket", (("le", "4.0"),)] == 1


def test_a_series_that_is_no_more_becomes_zero(found: dict[str, Gauge]) -> None:
    metrics = Metrics(max_batch_rows=4)
    bridge = RayMetrics(metrics.registry)
    model = ModelInfo(name="", path=Path(), class_names=(), num_classes=0, valid_classes=1, prediction_type="epsilon",
                      can_guide=False, image_size=8, defaults=SamplerConfig(), backend_name="cpu",
                      average_activation_bits=2.0, weight_bytes=1, decoder_name="pixels", decoder_weight_bytes=0,
                      digest="")  # fmt: skip
    for checkpoint in ("old", "new"):
        metrics.describe_model(dataclasses.replace(model, name=checkpoint))
        bridge.publish()
    by_checkpoint = {dict(labels)["checkpoint"]: value for labels, value in found["robuq_info"].values.items()}
    assert by_checkpoint == {"old": 0, "new": 1}


def wanted(images: list[float], requests: list[float], queued: float, target: float = 8.0) -> float:
    found = {
        IMAGES: {f"replica {i}": value for i, value in enumerate(images)},
        REQUESTS: {f"replica {i}": value for i, value in enumerate(requests)},
    }
    context = SimpleNamespace(
        aggregated_metrics=found, total_queued_requests=queued, config=SimpleNamespace(target_ongoing_requests=target)
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


@given(st.lists(st.floats(0, 1e4), max_size=8), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.1, 1e3))
def test_more_work_never_asks_for_fewer(images: list[float], queued: float, more: float, target: float) -> None:
    requests = [value / 2 for value in images]
    assert wanted(images, requests, queued + more, target) >= wanted(images, requests, queued, target)
    assert wanted([*images, more], [*requests, more / 2], 0, target) >= wanted(images, requests, 0, target)


def test_ray_can_run_a_copy_without_this_package() -> None:
    tree = ast.parse(Path(ray_support.__file__).read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in modules} <= {"__future__", "typing", "random", "prometheus_client", "ray"}
