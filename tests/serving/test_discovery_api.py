"""/classes, /info and /queue."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serving_harness import WAIT_S, WatchedSampler, live_server, until
from test_live_server import raw_request

from server.fake import FakeSampler


def names(client: httpx.Client, **parameters: Any) -> list[str]:
    answer = client.get("/classes", params=parameters)
    assert answer.status_code == 200
    return [item["name"] for item in answer.json()["classes"]]


def test_classes_are_searched(client: httpx.Client) -> None:
    assert names(client, query="shark") == ["great white shark"]
    assert names(client, query="goldfsh") == ["goldfish"]
    assert names(client) == ["tench", "goldfish", "great white shark", "crane", "crane"]
    assert names(client, limit=2) == ["tench", "goldfish"]
    assert client.get("/classes", params={"query": "3"}).json() == {"classes": [{"id": 3, "name": "crane"}]}


@pytest.mark.parametrize("parameters", [{"limit": 0}, {"limit": 1001}, {"limit": "many"}, {"query": "x" * 201}])
def test_wrong_parameters_are_named(client: httpx.Client, parameters: dict[str, Any]) -> None:
    answer = client.get("/classes", params=parameters)
    assert answer.status_code == 422
    assert (answer.json()["error"]["code"], answer.json()["error"]["field"]) == ("invalid_request", *parameters)


def test_info_tells_what_the_server_can(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert info["priorities"] == {"min": 0, "max": 9, "default": 0, "ageing_s": 5.0}
    assert {"streaming", "idempotency", "openai"} <= set(info["features"])
    assert info["replicas"] == 1


def test_the_queue_as_it_fills_and_empties() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, max_batch_rows=4) as (client, engine):
        idle = client.get("/queue").json()
        assert idle == {
            "status": "ready",
            "requests_running": 0,
            "requests_waiting": 0,
            "images_in_flight": 0,
            "images_waiting": 0,
            "images_decoding": 0,
            "replicas": [{"rows": 0, "row_budget": 4, "alive": True}],
        }
        sampler.hold()
        with raw_request(client, {"class_id": 1, "num_images": 3}):  # each takes two rows: two of them fit
            assert sampler.entered.acquire(timeout=WAIT_S)
            with raw_request(client, {"class_id": 1, "num_images": 4}):
                until(lambda: engine.requests_waiting == 1)
                busy = client.get("/queue").json()
        assert (busy["requests_running"], busy["requests_waiting"]) == (1, 1)
        assert (busy["images_in_flight"], busy["images_waiting"]) == (7, 5)
        assert busy["replicas"] == [{"rows": 4, "row_budget": 4, "alive": True}]
        sampler.release()
        until(lambda: client.get("/queue").json() == idle)


def test_every_route_describes_the_checkpoint_that_is_served_now() -> None:
    class Other(FakeSampler):
        checkpoint_name = "other"

    with live_server(FakeSampler()) as (client, engine):
        assert client.post("/generate", json={"class_name": "goldfish"}).status_code == 200
        engine.swap("other", [Other(image_size=8, class_names=("koi", "eel"))])
        assert client.get("/info").json()["checkpoint"] == "other"
        assert names(client) == ["koi", "eel"]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["other"]
        assert client.post("/generate", json={"class_name": "eel"}).json()["class_id"] == 1
        wrong = client.post("/generate", json={"class_id": 2}).json()["error"]["message"]
        assert "from 0 to 1" in wrong
        wrong = client.post("/generate", json={"class_id": -1}).json()["error"]["message"]
        assert "from 0 to 1" in wrong
        image = client.post("/v1/images/generations", json={"prompt": "koi", "size": "8x8"})
        assert image.json()["size"] == "8x8"
        document = client.get("/openapi.json").json()
        schema = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["class_id"]["anyOf"][0]["maximum"] == 1
