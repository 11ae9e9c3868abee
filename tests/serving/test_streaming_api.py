"""``stream: true``: events in order, previews, errors before and after the first event, clients that hang up."""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from process_harness import second_steps_wait, serving
from serving_harness import WAIT_S, WatchedSampler, live_server, until

from server import service

Event = tuple[str, dict[str, Any]]


@pytest.fixture
def begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer begins without an event: who has it hears of all that happens from then on."""
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.05)


def events_in(lines: Iterable[str]) -> Iterator[Event]:
    """Events by the rules of server-sent events, as they come; comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields and not line:
            yield fields["event"], json.loads(fields["data"])
            fields = {}


def parse(text: str) -> list[Event]:
    return list(events_in(text.splitlines()))


def stream(client: httpx.Client, body: dict[str, Any], **options: Any) -> list[Event]:
    answer = client.post("/generate", json={"class_id": 1, "stream": True} | body, **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parse(answer.text)
    assert all(name == data["type"] for name, data in events if name != "error")
    return events


def of_kind(events: list[Event], name: str) -> list[dict[str, Any]]:
    return [data for kind, data in events if kind == name]


def test_the_last_event_is_the_json_answer(client: httpx.Client) -> None:
    body = {"seed": 5, "num_images": 2, "steps": 3}
    events = stream(client, body)
    name, completed = events[-1]
    assert name == "image_generation.completed"
    plain = client.post("/generate", json={"class_id": 1} | body).json()
    del completed["type"], completed["timings"], plain["timings"]
    assert completed == plain


def test_every_step_of_every_image_is_told_to_who_reads_in_time(begins_at_once: None) -> None:
    sampler = WatchedSampler()
    body = {"class_id": 1, "stream": True, "num_images": 2, "steps": 4, "guidance_scale": 1}
    with live_server(sampler) as (client, _):
        sampler.hold()
        with client.stream("POST", "/generate", json=body) as answer:
            events = events_in(answer.iter_lines())
            for done in range(1, 5):
                sampler.permit()
                told = [next(events), next(events)]
                step = {"type": "image_generation.step", "steps_done": done, "steps": 4}
                assert told == [(step["type"], step | {"image": image}) for image in (0, 1)]
            assert next(events)[0] == "image_generation.completed"


def test_previews_are_whole_images_of_the_asked_format(begins_at_once: None) -> None:
    sampler = WatchedSampler()
    body = {"class_id": 1, "stream": True, "steps": 6, "preview_every": 2, "format": "webp", "guidance_scale": 1}
    with live_server(sampler) as (client, _):
        sampler.hold()
        with client.stream("POST", "/generate", json=body) as answer:
            sampler.release()
            events = list(events_in(answer.iter_lines()))
    previews = of_kind(events, "image_generation.partial_image")
    assert previews
    for preview in previews:
        assert (preview["image"], preview["steps"], preview["format"]) == (0, 6, "webp")
        assert preview["steps_done"] == 2 * (preview["partial_image_index"] + 1) < 6
        assert Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))).size == (32, 32)


def test_an_error_before_the_first_event_is_a_plain_answer() -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler) as (client, engine):
        for body, status, code in (
            ({"class_id": 99}, 422, "invalid_request"),
            ({"class_id": 1, "seed": 7}, 500, "generation_failed"),
        ):
            answer = client.post("/generate", json=body | {"stream": True})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        sampler.hold()
        answer = client.post("/generate", json={"class_id": 1, "stream": True, "timeout_s": 0.3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        sampler.release()
        until(lambda: engine.idle)
        engine.begin_drain()
        answer = client.post("/generate", json={"class_id": 1, "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_a_queue_is_bridged_by_heartbeats_and_then_errors_are_events(begins_at_once: None) -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, _):
        sampler.hold()
        with client.stream("POST", "/generate", json={"class_id": 1, "seed": 7, "stream": True}) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert next(lines).startswith(": ping")
            sampler.faulty_seeds = {7}
            sampler.release()
            assert list(events_in(lines)) == [
                ("error", {"error": {"code": "generation_failed", "message": "the model failed on this request"}})
            ]


def test_closing_the_stream_frees_the_rows_at_the_next_step(begins_at_once: None) -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        sampler.hold()
        with client.stream(
            "POST", "/generate", json={"class_id": 1, "steps": 1000, "num_images": 4, "stream": True}
        ) as answer:
            sampler.permit(2)
            events = events_in(answer.iter_lines())  # held, or it would close the stream behind it
            assert next(events)[0] == "image_generation.step"
            for _ in range(3):
                assert sampler.entered.acquire(timeout=WAIT_S)
        until(lambda: engine.idle)  # while the third step still runs
        steps = len(sampler.batches)
        sampler.release()
        assert client.post("/generate", json={"class_id": 1, "steps": 2}).status_code == 200
        assert [len(batch) for batch in sampler.batches[steps:]] == [1, 1]


def test_accept_must_allow_events(client: httpx.Client) -> None:
    for accept in ("text/event-stream", "*/*", "application/json"):
        assert stream(client, {}, headers={"Accept": accept})
    refused = client.post("/generate", json={"class_id": 1, "stream": True}, headers={"Accept": "image/png"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (406, "not_acceptable")
    refused = client.post("/generate", json={"class_id": 1, "preview_every": 2})
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "preview_every")


def test_a_request_may_ask_for_less_time_but_not_for_more() -> None:
    sampler = WatchedSampler(step_s=0.01)
    with live_server(sampler, request_timeout_s=5) as (client, engine):
        answer = client.post("/generate", json={"class_id": 1, "steps": 1000, "timeout_s": 0.1})
        assert (answer.status_code, answer.json()["error"]["message"]) == (504, "not done within 0.1 s")
        until(lambda: engine.idle)
        for wrong in (0, 5.5, "1", float("1e300")):
            answer = client.post("/generate", json={"class_id": 1, "timeout_s": wrong})
            assert (answer.status_code, answer.json()["error"]["field"]) == (422, "timeout_s")
            assert "from 0.01 to 5" in answer.json()["error"]["message"]


def test_a_stream_in_flight_ends_whole_before_the_process_does(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        serving("--drain-timeout-s", "600", change=second_steps_wait(40, gate)) as (process, client),
        client.stream("POST", "/generate", json={"class_id": 1, "steps": 40, "stream": True}) as answer,
    ):
        chunks = answer.iter_text()
        text = next(chunks)
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        gate.touch()
        events = parse(text + "".join(chunks))
        assert events[-1][0] == "image_generation.completed"
        assert process.wait(WAIT_S) == 0
