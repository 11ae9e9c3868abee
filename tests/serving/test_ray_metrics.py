"""The series that Ray is told, against those of /metrics."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import ClassVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray.serve")

from robuq_core.config import SamplerConfig
from server import ray_support
from server.metrics import Metrics, WorkerMemory
from server.ray_support import RayMetrics
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
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gauge]:
    monkeypatch.setattr(Gauge, "made", {})
    monkeypatch.setattr(ray_support, "Gauge", Gauge)
    return Gauge.made


def test_every_sample_is_told_as_it_is(told: dict[str, Gauge]) -> None:
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
        for name, gauge in told.items()
        for labels, value in gauge.values.items()
        if "resident" not in name
    }
    assert seen == expected
    assert seen["robuq_requests_waiting", ()] == 3
    assert seen["robuq_batch_rows_bucket", (("le", "4.0"),)] == 1


def test_the_workers_series_have_no_label_of_rays(told: dict[str, Gauge]) -> None:
    metrics = Metrics(max_batch_rows=4)
    metrics.watch_workers(lambda: [WorkerMemory(0, os.getpid(), [1, 2, 3])])
    RayMetrics(metrics.registry).publish()
    assert told["robuq_worker_resident_memory_bytes"].tag_keys == ("worker",)
    assert told["robuq_gpu_memory_peak_bytes"].tag_keys == ("gpu",)


def test_a_series_that_is_no_more_becomes_zero(told: dict[str, Gauge]) -> None:
    metrics = Metrics(max_batch_rows=4)
    bridge = RayMetrics(metrics.registry)
    model = ModelInfo(name="", path=Path(), class_names=(), num_classes=0, valid_classes=1, prediction_type="epsilon",
                      can_guide=False, image_size=8, defaults=SamplerConfig(), backend_name="cpu",
                      average_activation_bits=2.0, weight_bytes=1, decoder_name="pixels", decoder_weight_bytes=0,
                      digest="")  # fmt: skip
    for checkpoint in ("old", "new"):
        metrics.describe_model(dataclasses.replace(model, name=checkpoint))
        bridge.publish()
    by_checkpoint = {dict(labels)["checkpoint"]: value for labels, value in told["robuq_info"].values.items()}
    assert by_checkpoint == {"old": 0, "new": 1}
