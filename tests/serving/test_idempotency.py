"""Idempotency-Key: the same answer again, joined or replayed; conflicts; what is kept, how long and how much."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server.api.errors import ApiError
from server.api.generation import Generation, Replay
from server.api.idempotency import ENTRY_BYTES, Replays
from server.api.order import Order
from server.engine import Engine, Result, Timings
from serving_harness import WAIT_S, WatchedSampler, live_server, until
from test_live_server import finished, raw_request

from robuq_core.params import RowSpec


def post(client: httpx.Client, key: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return client.post("/generate", json={"class_id": 1} | body, headers={"Idempotency-Key": key, **headers})


def test_a_repeated_request_gets_the_same_answer_and_draws_nothing() -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        first = post(client, "a", {"num_images": 2})
        steps = len(sampler.batches)
        # Equal in meaning: another order of fields, and a default spelt out.
        again = post(client, "a", {"priority": 0, "num_images": 2})
        assert (again.status_code, again.content) == (200, first.content)
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["x-seed"] == first.headers["x-seed"]
        assert len(sampler.batches) == steps
        assert post(client, "b", {"num_images": 2}).json()["seed"] != first.json()["seed"]
        assert finished(engine, "completed") == 2


def test_another_body_or_another_kind_of_answer_is_a_conflict(client: httpx.Client) -> None:
    post(client, "conflict", {"seed": 1})
    for answer in (post(client, "conflict", {"seed": 2}), post(client, "conflict", {"seed": 1}, Accept="image/png")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert answer.json()["error"]["field"] == "Idempotency-Key"


def test_a_raw_answer_is_replayed_raw(client: httpx.Client) -> None:
    first, again = (post(client, "raw", {}, Accept="image/webp") for _ in range(2))
    assert again.headers["content-type"] == "image/webp"
    assert again.content == first.content


def test_a_stream_is_replayed_as_its_end(client: httpx.Client) -> None:
    first, again = (post(client, "stream", {"stream": True, "steps": 2}) for _ in range(2))
    assert again.text.startswith("event: image_generation.completed\n")
    assert first.text.endswith(again.text)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "a\tb"])
def test_what_is_no_key(client: httpx.Client, key: str) -> None:
    answer = post(client, key, {})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "Idempotency-Key")


def test_requests_in_flight_are_joined_and_one_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WatchedSampler()
    joined = threading.Semaphore(0)
    join = Generation.join

    def counted(generation: Generation) -> None:
        join(generation)
        joined.release()

    monkeypatch.setattr(Generation, "join", counted)
    with live_server(sampler) as (client, engine), ThreadPoolExecutor(3) as pool:
        sampler.hold()
        with raw_request(client, {"class_id": 1, "steps": 3}, "Idempotency-Key: k\r\n"):
            assert sampler.entered.acquire(timeout=WAIT_S)
            others = [pool.submit(post, client, "k", {"steps": 3}) for _ in range(2)]
            conflict = post(client, "k", {"steps": 4})
            assert conflict.status_code == 409
            # All three, or the first could be the last to leave.
            assert all(joined.acquire(timeout=WAIT_S) for _ in range(3))
        # The client that brought the work has gone, and the work goes on.
        sampler.release()
        answers = [other.result() for other in others]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        assert finished(engine, "completed") == 1
        assert finished(engine, "cancelled") == 0
        assert len(sampler.batches) == 3


def test_a_stream_may_be_joined_and_outlives_the_first_client() -> None:
    sampler = WatchedSampler()
    body = {"class_id": 1, "steps": 4, "guidance_scale": 1, "stream": True}
    with live_server(sampler) as (client, engine), ThreadPoolExecutor(1) as pool:
        sampler.hold()
        with client.stream("POST", "/generate", json=body, headers={"Idempotency-Key": "k"}) as first:
            sampler.permit()
            lines = first.iter_lines()  # held, or it would close the stream behind it
            assert next(lines) == "event: image_generation.step"
            second = pool.submit(client.post, "/generate", json=body, headers={"Idempotency-Key": "k"})
            until(lambda: len(buffers_of(engine)) == 2)
        sampler.release()
        events = [line for line in second.result().text.splitlines() if line.startswith("event: ")]
        assert events[-1] == "event: image_generation.completed"
        assert "event: image_generation.step" in events
        assert finished(engine, "completed") == 1


def buffers_of(engine: Engine) -> tuple[object, ...]:
    """The buffers that the one request in flight feeds."""
    (job,) = engine._ledger.jobs.values()
    return job.on_event.__self__._buffers  # type: ignore[union-attr,no-any-return]


def test_when_all_have_left_the_work_ends_and_the_key_is_free_again() -> None:
    sampler = WatchedSampler()
    with live_server(sampler) as (client, engine):
        sampler.hold()
        with raw_request(client, {"class_id": 1, "steps": 9}, "Idempotency-Key: k\r\n"):
            assert sampler.entered.acquire(timeout=WAIT_S)
        until(lambda: engine.idle)
        sampler.release()
        assert post(client, "k", {"steps": 1}).status_code == 200


def test_failures_are_not_kept() -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler) as (client, _):
        assert post(client, "k", {"seed": 7}).status_code == 500
        sampler.faulty_seeds = set()
        assert post(client, "k", {"seed": 7}).status_code == 200


def test_zero_seconds_turn_it_off() -> None:
    with live_server(WatchedSampler(), idempotency_ttl_s=0) as (client, _):
        assert post(client, "k", {}).json()["seed"] != post(client, "k", {}).json()["seed"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def generation(seed: int, image_bytes: int) -> Generation:
    order = Order("fake", 0, "", seed, (RowSpec(0, seed, 1, 1.0, "ddim"),), "png", "32x32", 1.0)
    return Replay(order, Result((bytes(image_bytes),), Timings(0, 0, 0, 0)))


async def keep(replays: Replays, client: str, key: str, image_bytes: int = 0) -> None:
    replays.begin(client, key, b"same", generation(len(key), image_bytes))
    await asyncio.sleep(0)


def test_answers_expire() -> None:
    async def run() -> None:
        clock = Clock()
        replays = Replays(10.0, clock=clock)
        await keep(replays, "", "early")
        clock.now = 6.0
        await keep(replays, "", "late")
        clock.now = 10.0
        assert replays.find("", "early", b"same") is None
        assert replays.find("", "late", b"same") is not None
        clock.now = 16.0
        assert replays.find("", "late", b"same") is None
        assert replays.size == 0

    asyncio.run(run())


def test_clients_do_not_see_each_others_keys() -> None:
    async def run() -> None:
        replays = Replays(10.0)
        await keep(replays, "ann", "k")
        assert replays.find("bob", "k", b"other") is None
        with pytest.raises(ApiError):
            replays.find("ann", "k", b"other")

    asyncio.run(run())


def test_beyond_the_limit_who_holds_most_loses_the_oldest() -> None:
    async def run() -> None:
        image = 10_000
        replays = Replays(10.0, max_bytes=4 * (image + ENTRY_BYTES))
        await keep(replays, "modest", "k", image)
        for i in range(20):
            await keep(replays, "greedy", f"k{i}", image)
            assert replays.size <= 4 * (image + ENTRY_BYTES)
        assert replays.find("modest", "k", b"same") is not None
        found = [i for i in range(20) if replays.find("greedy", f"k{i}", b"same") is not None]
        assert found == [17, 18, 19]
        await keep(replays, "huge", "k", 10 * image)  # larger than all that there is room for
        assert replays.find("huge", "k", b"same") is None

    asyncio.run(run())
