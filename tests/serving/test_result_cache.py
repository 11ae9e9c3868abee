"""Requests with a chosen seed are generated once: hits, shared flights, bounds; Idempotency-Key, which is a seed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from serving_harness import WAIT_S, WatchedSampler, live_server, sample, until
from test_live_server import raw_request

from robuq_core.params import RowSpec
from server.cache import ENTRY_BYTES, Cache
from server.fake import FakeSampler
from server.keys import create_key
from server.metrics import Metrics
from server.request import ModelInfo, Request, Result, Timings

ON = {"cache_bytes": 2**20}
BODY: dict[str, object] = {"class_id": 1, "steps": 2, "seed": 7}


def post(client: httpx.Client, body: dict[str, Any], **headers: str) -> httpx.Response:
    return client.post("/generate", json=body, headers=headers)


def test_a_repeated_seed_is_a_hit_with_the_same_bytes() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, **ON) as (client, engine):
        first = post(client, BODY)
        steps = len(sampler.batches)
        # Equal in meaning: another order of fields, a default that is spelt out, the class by its name.
        again = post(client, {"seed": 7, "num_images": 1, "class_name": first.json()["class_name"], "steps": 2})
        assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
        assert again.json()["images"] == first.json()["images"]
        assert again.json() | {"timings": None} == first.json() | {"timings": None}
        assert len(sampler.batches) == steps
        assert sample(engine, "robuq_cache_requests_total", outcome="hit") == 1
        assert sample(engine, "robuq_cache_requests_total", outcome="miss") == 1
        assert 0 < sample(engine, "robuq_cache_bytes") <= ON["cache_bytes"]


@pytest.mark.parametrize(
    "change",
    [{"class_id": 2}, {"seed": 8}, {"seed": 7 + 2**32}, {"steps": 3}, {"guidance_scale": 2.0}, {"sampler": "ddpm"},
     {"guidance_interval": [0, 500]}, {"cache_interval": 2}, {"format": "webp"}, {"num_images": 2}],
)  # fmt: skip
def test_whatever_the_bytes_depend_on_is_a_miss(change: dict[str, Any]) -> None:
    with live_server(FakeSampler(), **ON) as (client, _):
        post(client, BODY)
        assert post(client, BODY | change).headers["x-cache"] == "miss"
        assert post(client, BODY).headers["x-cache"] == "hit"


def test_raw_answers_streams_and_openai_hit_too_but_not_another_checkpoint_nor_a_random_seed() -> None:
    other = FakeSampler()
    other.digest = "other"  # type: ignore[misc]
    with live_server(FakeSampler(), **ON) as (client, engine):
        for _ in range(2):
            raw = post(client, BODY, Accept="image/png")
            stream = post(client, BODY | {"stream": True})
            official = client.post("/v1/images/generations", json={"prompt": "1", "steps": 2, "seed": 7})
        assert raw.headers["x-cache"] == stream.headers["x-cache"] == official.headers["x-cache"] == "hit"
        assert raw.content.startswith(b"\x89PNG")
        assert stream.text.startswith("event: image_generation.completed\n")
        engine.swap("other", [other])
        assert post(client, BODY).headers["x-cache"] == "miss"
        for body in ({"class_id": 1}, {"class_id": 1, "seed": -1}, {"class_id": 1, "seed": None}):
            assert "x-cache" not in post(client, body).headers


def test_64_equal_requests_are_one_computation_though_a_third_disconnect() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, **ON) as (client, engine), ThreadPoolExecutor(64) as pool:
        sampler.hold()
        first = pool.submit(post, client, BODY)
        assert sampler.entered.acquire(timeout=WAIT_S)
        with ExitStack() as leaving:
            for _ in range(21):
                leaving.enter_context(raw_request(client, BODY))
            others = [pool.submit(post, client, BODY) for _ in range(42)]
            until(lambda: sample(engine, "robuq_cache_requests_total", outcome="shared") == 63)
        sampler.release()
        answers = [each.result() for each in (first, *others)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["images"][0] for answer in answers}) == 1
        assert sorted(answer.headers["x-cache"] for answer in answers) == ["miss"] + ["shared"] * 42
        assert len(sampler.batches) == BODY["steps"]
        assert sample(engine, "robuq_requests_total", finished_reason="completed") == 1
        until(lambda: engine.idle)


def test_the_first_may_leave_and_the_last_ends_the_work() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, **ON) as (client, engine), ThreadPoolExecutor(1) as pool:
        sampler.hold()
        with raw_request(client, BODY):
            assert sampler.entered.acquire(timeout=WAIT_S)
            other = pool.submit(post, client, BODY)
            until(lambda: sample(engine, "robuq_cache_requests_total", outcome="shared") == 1)
        sampler.release()
        assert other.result().status_code == 200
        sampler.hold()
        with raw_request(client, BODY | {"seed": 8}):
            assert sampler.entered.acquire(timeout=WAIT_S)
        until(lambda: sample(engine, "robuq_requests_total", finished_reason="cancelled") == 1)
        sampler.release()
        assert post(client, BODY | {"seed": 8}).headers["x-cache"] == "miss"


def test_a_short_deadline_is_that_of_its_own_request_alone() -> None:
    sampler = WatchedSampler()
    with live_server(sampler, **ON) as (client, _), ThreadPoolExecutor(1) as pool:
        sampler.hold()
        patient = pool.submit(post, client, BODY)
        assert sampler.entered.acquire(timeout=WAIT_S)
        assert post(client, BODY | {"timeout_s": 0.05}).status_code == 504
        sampler.release()
        assert patient.result().status_code == 200


def test_failures_are_not_kept() -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler, **ON) as (client, _):
        assert post(client, BODY).status_code == 500
        sampler.faulty_seeds = set()
        assert post(client, BODY).status_code == 200


def request_of(image_bytes: int, seed: int) -> tuple[Request, Result]:
    model = cast(ModelInfo, SimpleNamespace(name="m", digest="d", decoder_name="pixels", created=0))
    request = Request(model, (RowSpec(0, seed, 1, 1.0, "ddim"),), seed=seed, repeatable=True)
    return request, Result((bytes(image_bytes),), Timings(0, 0, 0, 0))


def test_the_least_recently_used_go_first_and_the_bound_holds() -> None:
    async def run() -> None:
        image = 10_000
        cache = Cache(4 * (image + ENTRY_BYTES), Metrics(4))

        async def keep(image_bytes: int, seed: int) -> None:
            request, result = request_of(image_bytes, seed)
            assert not cache.find(request)
            request.future = asyncio.get_running_loop().create_future()
            cache.follow(request)
            request.future.set_result(result)
            await asyncio.sleep(0)

        for seed in range(20):
            await keep(image, seed)
            assert cache.size <= 4 * (image + ENTRY_BYTES)
            if seed >= 16:
                assert cache.find(request_of(0, 16)[0])  # used, so it stays
        found = [seed for seed in range(20) if cache.find(request_of(0, seed)[0])]
        assert found == [16, 17, 18, 19]
        await keep(image, 20)
        assert not cache.find(request_of(0, 16)[0])
        await keep(10 * image, 21)  # larger than all that there is room for
        assert not cache.find(request_of(0, 21)[0])

    asyncio.run(run())


# Idempotency-Key.


def test_a_key_stands_for_a_seed() -> None:
    with live_server(FakeSampler(), **ON) as (client, _):
        body = {"class_id": 1, "num_images": 2}
        first, again = (post(client, body, **{"Idempotency-Key": "a"}) for _ in range(2))
        assert again.json()["images"] == first.json()["images"]
        assert (again.headers["x-cache"], again.headers["x-seed"]) == ("hit", first.headers["x-seed"])
        assert post(client, body, **{"Idempotency-Key": "b"}).json()["seed"] != first.json()["seed"]
        assert post(client, body | {"seed": 5}, **{"Idempotency-Key": "a"}).json()["seed"] == 5
        official = client.post("/v1/images/generations", json={"prompt": "1"}, headers={"Idempotency-Key": "a"})
        assert official.headers["x-seed"] == first.headers["x-seed"]


def test_a_key_needs_no_memory() -> None:
    seeds = set()
    for _ in range(2):  # a restarted server, and without the cache
        with live_server(FakeSampler()) as (client, _):
            answers = [post(client, {"class_id": 1}, **{"Idempotency-Key": "k"}) for _ in range(2)]
            assert all("x-cache" not in answer.headers for answer in answers)
            seeds.update(answer.json()["seed"] for answer in answers)
    assert len(seeds) == 1


def test_keys_of_clients_are_apart_and_a_hit_costs_no_images(tmp_path: Any) -> None:
    keys = [create_key(tmp_path / "keys.json", name, images_per_minute=2) for name in ("ann", "bob")]
    with live_server(FakeSampler(), api_keys_file=tmp_path / "keys.json", **ON) as (client, _):
        sent = [{"Idempotency-Key": "k", "X-API-Key": key} for key in keys]
        assert len({post(client, {"class_id": 1}, **headers).json()["seed"] for headers in sent}) == 2
        assert [post(client, BODY, **{"X-API-Key": keys[0]}).status_code for _ in range(3)] == [200] * 3
        assert post(client, BODY | {"seed": 8}, **{"X-API-Key": keys[0]}).status_code == 429


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "a\tb"])
def test_what_is_no_key(client: httpx.Client, key: str) -> None:
    answer = post(client, {"class_id": 1}, **{"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "Idempotency-Key")
