"""/health, /ready, /info and /metrics through the life of an engine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx
import pytest
from serving_harness import WAIT_S, WatchedSampler, live_server, sample, spec, until

import robuq_core
from server.fake import FakeRow

# What dashboards are built on; see the metrics section of the serving documents.
METRICS = {
    "robuq_api_keys_unreadable_seconds",
    "robuq_ready",
    "robuq_requests_running",
    "robuq_requests_waiting",
    "robuq_requests_total",
    "robuq_rejected_total",
    "robuq_images_total",
    "robuq_e2e_request_latency_seconds",
    "robuq_request_queue_time_seconds",
    "robuq_request_inference_time_seconds",
    "robuq_time_to_first_step_seconds",
    "robuq_step_duration_seconds",
    "robuq_decode_duration_seconds",
    "robuq_batch_rows",
    "robuq_engine_steps_total",
    "robuq_model_weight_bytes",
    "robuq_decoder_weight_bytes",
    "robuq_process_resident_memory_bytes",
    "robuq_info",
    "robuq_cache_bytes",
    "robuq_cache_requests_total",
    "robuq_worker_deaths_total",
    "robuq_worker_resident_memory_bytes",
    "robuq_workers_ready",
}


def test_health_ready_info(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    info = client.get("/info").json()
    assert info["version"] == robuq_core.__version__
    assert (info["checkpoint"], info["backend"], info["average_activation_bits"]) == ("fake", "fake", 2.0)
    assert info["decoder"] == {"name": "pixels", "weight_bytes": 0}
    assert (info["num_classes"], info["image_size"]) == (5, 32)
    assert info["defaults"] == {"sampler": "ddim", "steps": 4, "guidance_scale": 1.5}
    assert info["limits"]["max_images_per_request"] == 16
    assert info["samplers"] == ["ddpm", "ddim", "dpmsolver++"]


def test_metrics_by_name_and_fed() -> None:
    with live_server(WatchedSampler()) as (client, _):
        for _ in range(2):
            client.post("/generate", json={"class_id": 1, "num_images": 3, "steps": 2})
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert set(re.findall(r"^# TYPE (\S+) ", answer.text, re.MULTILINE)) == METRICS
    samples = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert samples['robuq_requests_total{finished_reason="completed"}'] == "2.0"
    assert samples["robuq_images_total"] == "6.0"
    assert samples["robuq_requests_running"] == samples["robuq_requests_waiting"] == "0.0"
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "time_to_first_step"):
        assert samples[f"robuq_{name}_seconds_count"] == "2.0"
    assert samples["robuq_decode_duration_seconds_count"] == "6.0"
    # Guided images take two of the four rows.
    assert samples["robuq_engine_steps_total"] == samples["robuq_batch_rows_count"] == "8.0"
    assert 'robuq_e2e_request_latency_seconds_bucket{le="0.025"}' in samples
    assert float(samples["robuq_process_resident_memory_bytes"]) > 1e6
    info = next(name for name in samples if name.startswith("robuq_info"))
    assert 'checkpoint="fake"' in info
    assert 'avg_activation_bits="2"' in info


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


def test_health_asks_for_a_restart_when_workers_keep_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.fleet.FIRST_PAUSE_S", 0.0)
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):

        def die(rows: Sequence[FakeRow]) -> None:
            if rows[0].spec.steps == 7:  # more than those of a warm-up
                raise SystemExit

        sampler.on_step = die
        while engine.status != "failed":
            # Each request takes two workers along; four deaths within a minute are too many.
            assert client.post("/generate", json={"class_id": 1, "steps": 7}).status_code in (500, 503)
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="exited") == 4)
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
