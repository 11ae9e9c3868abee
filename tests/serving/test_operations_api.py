"""/health, /ready, /info, /classes, /queue and /metrics through the life of a server; the lines of its log."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import httpx
from fastapi.testclient import TestClient
from serving_harness import WAIT_S, WatchedSampler, live_server, make_settings, sample, spec, until
from test_live_server import raw_request

import robuq_core
from server.app import create_app
from server.fake import FakeSampler
from server.logs import JsonFormatter
from server.metrics import Metrics
from server.pool import Pool

# What dashboards are built on.
METRICS = {
    *("robuq_api_keys_unreadable_seconds", "robuq_ready", "robuq_requests_running", "robuq_requests_waiting"),
    *("robuq_requests_total", "robuq_rejected_total", "robuq_images_total", "robuq_e2e_request_latency_seconds"),
    *("robuq_request_queue_time_seconds", "robuq_request_inference_time_seconds", "robuq_time_to_first_step_seconds"),
    *("robuq_step_duration_seconds", "robuq_decode_duration_seconds", "robuq_batch_rows", "robuq_engine_steps_total"),
    *("robuq_model_weight_bytes", "robuq_decoder_weight_bytes", "robuq_process_resident_memory_bytes", "robuq_info"),
    *("robuq_cache_bytes", "robuq_cache_requests_total", "robuq_worker_deaths_total", "robuq_workers_ready"),
    "robuq_worker_resident_memory_bytes",
}


def names(client: httpx.Client, **parameters: Any) -> list[str]:
    answer = client.get("/classes", params=parameters)
    assert answer.status_code == 200
    return [item["name"] for item in answer.json()["classes"]]


def test_health_ready_info_classes(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    expected = {
        **{"version": robuq_core.__version__, "checkpoint": "fake", "backend": "fake", "average_activation_bits": 2.0},
        **{"decoder": {"name": "pixels", "weight_bytes": 0}, "num_classes": 5, "image_size": 32, "replicas": 1},
        "defaults": {"sampler": "ddim", "steps": 4, "guidance_scale": 1.5},
        "samplers": ["ddpm", "ddim", "dpmsolver++"],
        "priorities": {"min": 0, "max": 9, "default": 0, "ageing_s": 5.0},
        "features": ["streaming", "previews", "priorities", "deadlines", "openai", "idempotency"],
        "limits": {"max_images_per_request": 16, "max_batch_rows": 4, "max_queue_images": 16,
                   "request_timeout_s": 300.0,
                   "max_body_bytes": 65536},
    }  # fmt: skip
    assert expected.items() <= client.get("/info").json().items()
    assert names(client) == ["tench", "goldfish", "great white shark", "crane", "crane"]
    assert names(client, query="goldfsh", limit=1) == ["goldfish"]
    assert client.get("/classes", params={"query": "3"}).json() == {"classes": [{"id": 3, "name": "crane"}]}
    for parameter in ({"limit": 0}, {"limit": 1001}, {"limit": "many"}, {"query": "x" * 201}):
        answer = client.get("/classes", params=parameter)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, *parameter)


def test_metrics_by_name_and_fed() -> None:
    with live_server(WatchedSampler()) as (client, _):
        for _ in range(2):
            client.post("/generate", json={"class_id": 1, "num_images": 3, "steps": 2})
        text = client.get("/metrics").text
    assert set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)) == METRICS
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples['robuq_requests_total{finished_reason="completed"}'] == "2.0"
    assert samples["robuq_images_total"] == samples["robuq_decode_duration_seconds_count"] == "6.0"
    assert samples["robuq_requests_running"] == samples["robuq_requests_waiting"] == "0.0"
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "time_to_first_step"):
        assert samples[f"robuq_{name}_seconds_count"] == "2.0"
    # Guided images take two of the four rows.
    assert samples["robuq_engine_steps_total"] == samples["robuq_batch_rows_count"] == "8.0"
    assert float(samples["robuq_process_resident_memory_bytes"]) > 1e6
    info = next(name for name in samples if name.startswith("robuq_info"))
    assert 'checkpoint="fake"' in info
    assert 'avg_activation_bits="2"' in info


def test_the_queue_as_it_fills_and_empties() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, max_batch_rows=4) as (client, engine):
        idle = client.get("/queue").json()
        assert idle == {
            **{"status": "ready", "requests_running": 0, "requests_waiting": 0, "images_in_flight": 0},
            **{"images_waiting": 0, "images_decoding": 0},
            "replicas": [{"rows": 0, "row_budget": 4, "alive": True}],
        }
        sampler.hold()
        with raw_request(client, {"class_id": 1, "num_images": 3}):  # each takes two rows: two of them fit
            assert sampler.entered.acquire(timeout=WAIT_S)
            with raw_request(client, {"class_id": 1, "num_images": 4}):
                until(lambda: engine.requests_waiting == 1)
                busy = client.get("/queue").json()
        assert busy == {
            **{"status": "ready", "requests_running": 1, "requests_waiting": 1, "images_in_flight": 7},
            **{"images_waiting": 5, "images_decoding": 0},
            "replicas": [{"rows": 4, "row_budget": 4, "alive": True}],
        }
        sampler.release()
        until(lambda: client.get("/queue").json() == idle)


def test_every_route_describes_the_checkpoint_that_is_served_now() -> None:
    other = FakeSampler(image_size=8, class_names=("koi", "eel"))
    other.checkpoint_name = "other"
    with live_server(FakeSampler()) as (client, engine):
        assert client.post("/generate", json={"class_name": "goldfish"}).status_code == 200
        engine.swap("other", [other])
        assert client.get("/info").json()["checkpoint"] == "other"
        assert names(client) == ["koi", "eel"]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["other"]
        assert client.post("/generate", json={"class_name": "eel"}).json()["class_id"] == 1
        for class_id in (2, -1):
            wrong = client.post("/generate", json={"class_id": class_id}).json()["error"]["message"]
            assert "from 0 to 1" in wrong
        image = client.post("/v1/images/generations", json={"prompt": "koi", "size": "8x8"})
        assert image.json()["size"] == "8x8"
        document = client.get("/openapi.json").json()
        schema = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["class_id"]["anyOf"][0]["maximum"] == 1


def test_ready_follows_the_pool() -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        sampler.hold()  # the warm-up of the next worker, too
        job = engine.submit([spec()], "png")
        assert sampler.entered.acquire(timeout=WAIT_S)
        engine.make_stale()
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json() == {"status": "restarting"}
        assert client.get("/health").status_code == 200
        refused = client.post("/generate", json={"class_id": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert int(refused.headers["retry-after"]) >= 1
        sampler.release()
        job.future.result(WAIT_S)  # tried again by the worker that replaced the one that hung
        until(lambda: client.get("/ready").status_code == 200)
        assert "\nrobuq_ready 1.0\n" in client.get("/metrics").text
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        engine.begin_drain()
        assert client.get("/ready").json() == {"status": "draining"}
        assert "\nrobuq_ready 0.0\n" in client.get("/metrics").text
        assert client.get("/health").status_code == 200
        assert client.post("/generate", json={"class_id": 1}).json()["error"]["code"] == "draining"


def test_requests_that_come_before_the_model_count_as_rejected() -> None:
    settings = make_settings()
    pool = Pool(settings, Metrics(4))  # not started
    client = TestClient(create_app(pool, settings), "http://localhost")
    for path, body in (("/generate", {"class_id": 1}), ("/v1/images/generations", {"prompt": "1"})):
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert client.get("/info").status_code == 503
    assert pool.metrics.registry.get_sample_value("robuq_rejected_total", {"reason": "starting"}) == 2


def test_a_line_of_the_log_is_json_whatever_it_says() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.makeLogRecord(
            {"msg": "%d rows\nof %s", "args": (3, "two"), "levelname": "WARNING", "name": "server.test", "rows": 3,
             "path": object, "exc_info": sys.exc_info()}
        )  # fmt: skip
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["rows"]) == ("3 rows\nof two", "warning", 3)
    assert line["time"].endswith("+00:00")
    assert "ValueError: why" in line["exception"]
