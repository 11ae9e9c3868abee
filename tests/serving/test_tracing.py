"""traceparent in, trace ids in logs and answers, and OpenTelemetry spans of a whole request."""

from __future__ import annotations

import builtins
import json
import logging
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving_harness import WAIT_S, WatchedSampler, live_server, until

from robuq_core.errors import UserError
from server import telemetry
from server.logs import JsonFormatter, current_trace_id
from server.telemetry import trace_id_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ON = {"otel_endpoint": "http://localhost:4318"}


def test_what_is_a_traceparent() -> None:
    for header in (TRACEPARENT, f" {TRACEPARENT} ", f"cc-{TRACE}-{PARENT}-01-what-comes-later"):
        assert trace_id_of(header) == TRACE
    for header in (
        *("", f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-01-more", f"ff-{TRACE}-{PARENT}-01"),
        *(f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", TRACEPARENT.upper()),
    ):
        assert trace_id_of(header) == "", header


def test_logs_carry_the_trace(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    sent = {"one": {"traceparent": TRACEPARENT}, "none": {}, "junk": {"traceparent": "junk"}}
    logged: dict[str, str | None] = {}

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = json.loads(JsonFormatter().format(record))
            logged[line["request_id"]] = line.get("trace_id")

    handler = Lines()
    logging.getLogger("server.access").addHandler(handler)
    caplog.set_level(logging.INFO, "server.access")
    try:
        for name, headers in sent.items():
            client.get("/info", headers={"X-Request-Id": name, **headers})
        until(lambda: sent.keys() <= logged.keys())  # a line is written when its answer has gone
    finally:
        logging.getLogger("server.access").removeHandler(handler)
    assert {name: logged[name] for name in sent} == {"one": TRACE, "none": None, "junk": None}
    assert current_trace_id.get() == ""


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(telemetry, "SHUTDOWN_S", WAIT_S)
    monkeypatch.setattr(telemetry, "otlp_exporter", lambda endpoint: exporter)
    return exporter


def test_spans_of_a_request(exporter: InMemorySpanExporter) -> None:
    with live_server(WatchedSampler(step_s=0.005), **ON) as (client, _):
        headers = {"traceparent": TRACEPARENT, "X-Request-Id": "mine"}
        body = {"class_id": 2, "num_images": 3, "steps": 2, "seed": 5, "priority": 4}
        answer = client.post("/generate", json=body, headers=headers)
        assert client.get("/health").status_code == 200
    found = exporter.get_finished_spans()
    spans: dict[str, Any] = {span.name: span for span in found}
    assert len(found) == len(spans) == 2
    server, generation = spans["POST /generate"], spans["generation"]
    assert all(f"{span.context.trace_id:032x}" == TRACE for span in found)
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.resource.attributes["service.name"] == "robuq"
    assert generation.parent.span_id == server.context.span_id
    timings = {f"robuq.{name}": seconds for name, seconds in answer.json()["timings"].items()}
    assert dict(generation.attributes) == timings | {
        **{"robuq.model": "fake", "robuq.class_id": 2, "robuq.num_images": 3, "robuq.steps": 2, "robuq.seed": 5},
        **{"robuq.guidance_scale": 1.5, "robuq.guidance_interval": (0, 999), "robuq.cache_interval": 1},
        **{"robuq.sampler": "ddim", "robuq.format": "png", "robuq.priority": 4, "robuq.request_id": "mine"},
    }


def test_spans_of_failures(exporter: InMemorySpanExporter) -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler, **ON) as (client, _):
        assert client.post("/generate", json={"class_id": 1, "seed": 7}).status_code == 500
        assert client.post("/generate", json={"class_id": 99}).status_code == 422
        assert client.get("/v1/models").status_code == 200
    found = exporter.get_finished_spans()
    names = [span.name for span in found]
    assert sorted(names) == ["GET /v1/models", "POST /generate", "POST /generate", "generation"]
    generation = found[names.index("generation")]
    assert not generation.status.is_ok
    assert (generation.attributes or {})["error.type"] == "GenerationFailed"


def test_the_missing_extra_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_otel(name: str, *arguments: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_otel)
    with pytest.raises(UserError, match=r"--otel-endpoint .* pip install '\.\[otel\]'"):
        telemetry.Telemetry("http://localhost:4318")


def test_a_dead_collector_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SHUTDOWN_S", 0.2)
    with live_server(WatchedSampler(), otel_endpoint="http://127.0.0.1:9") as (client, _):
        assert client.post("/generate", json={"class_id": 1}).status_code == 200
