"""The scenarios' shapes and the bodies that they send."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import pytest
from PIL import Image

from loadtest.workload import BURST_PERIOD_S, SCENARIOS, Workload, gauges, users_at
from robuq_core.params import ImageParams, read_params
from server.generate import GenerateBody

INFO = {"num_classes": 7, "image_size": 32, "samplers": ["ddim", "ddpm"], "guidance": True}
FLOW = {"num_classes": 0, "image_size": 32, "samplers": ["euler", "heun", "sde"], "guidance": False}


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_every_scenario_keeps_within_its_users_and_ends(name: str) -> None:
    counts = [users_at(name, second, 8, 60.0) for second in range(60)]
    assert all(count is not None and 1 <= count <= 8 for count in counts)
    assert max(counts) == 8  # type: ignore[type-var]
    assert users_at(name, 60.0, 8, 60.0) is None
    assert users_at(name, 1e6, 8, None) is not None


def test_bursts_come_and_go() -> None:
    counts = [users_at("burst", second, 40, None) for second in range(int(2 * BURST_PERIOD_S))]
    assert counts == 2 * ([10] * int(BURST_PERIOD_S / 2) + [40] * int(BURST_PERIOD_S / 2))
    assert users_at("burst", 0, 1, None) == 1


@pytest.mark.parametrize("info", [INFO, FLOW])
def test_bodies_fit_the_model_and_follow_their_seed(info: dict[str, Any]) -> None:
    def bodies(seed: int) -> list[dict[str, Any]]:
        workload = Workload(info, [3, 5], max_images=3, rng=random.Random(seed))
        return [make() for _ in range(100) for make in (workload.plain, workload.mixed, workload.several)]

    sent = bodies(1)
    assert sent == bodies(1) != bodies(2)
    for body in sent:
        read_params(GenerateBody, json.dumps(body).encode())
        assert body.get("class_id", 0) in range(7)
        assert ("class_id" in body) == bool(info["num_classes"])
    assert {body["steps"] for body in sent if "steps" in body} == {3, 5}
    assert {body.get("num_images", 1) for body in sent} == {1, 2, 3}
    assert {body["sampler"] for body in sent if "sampler" in body} == set(info["samplers"])
    if not info["guidance"]:
        assert {body["guidance_scale"] for body in sent if "guidance_scale" in body} == {1}
    named = {name for body in sent for name in body}
    assert named >= set(ImageParams.model_fields) - {"class_id", "class_name"}


def png(size: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_answers_are_checked() -> None:
    workload = Workload(INFO)
    body = {"class_id": 3, "num_images": 2}
    workload.check(body, {"class_id": 3, "images": [png(32), png(32)]})
    for answer, fault in (
        ({"class_id": 4, "images": [png(32)] * 2}, "class_id"),
        ({"class_id": 3, "images": [png(32)]}, "1 images"),
        ({"class_id": 3, "images": [png(32), png(16)]}, "16"),
        ({"class_id": 3, "images": [png(32), "??"]}, "base64|[Nn]on-base"),
    ):
        with pytest.raises(ValueError, match=fault):
            workload.check(body, answer)


def test_gauges_are_read_from_the_exposition() -> None:
    text = '# HELP a b\n# TYPE a gauge\na 3.0\nb{x="1"} 4\nc 1e+06\n'
    assert gauges(text) == {"a": 3.0, "c": 1e6}
