"""Real checkpoints behind the real server: the same request gives the same bytes, alone or in a crowd."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_harness import live_server
from tiny import write_tiny

from robuq_core.config import DIFFUSION_SAMPLERS
from robuq_core.pipeline import Sampler

NEIGHBOURS = 32


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def real_client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    if request.param == "tiny":
        path: Path | None = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
        write_tiny(path)
    else:
        path = None
    with live_server(Sampler.from_checkpoint(path), max_batch_rows=16, max_queue_images=64) as (client, _):
        client.timeout = httpx.Timeout(60)
        yield client


def draw(client: httpx.Client, body: dict[str, Any]) -> bytes:
    answer = client.post("/generate", json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_a_class_alone_draws_an_image(real_client: httpx.Client) -> None:
    info = real_client.get("/info").json()
    class_id = info["num_classes"] - 1
    answer = real_client.post("/generate", json={"class_id": class_id}).json()
    assert (answer["class_id"], answer["steps"]) == (class_id, info["defaults"]["steps"])
    by_name = real_client.post("/generate", json={"class_name": answer["class_name"], "steps": 1})
    assert by_name.json()["class_id"] == class_id


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_the_same_bytes_alone_and_among_random_neighbours(real_client: httpx.Client, sampler: str) -> None:
    num_classes = real_client.get("/info").json()["num_classes"]
    rng = random.Random(7)
    wanted = {"class_id": 7, "seed": 42, "steps": 6, "guidance_scale": 2.5, "sampler": sampler}
    crowd = [
        {
            "class_id": rng.randrange(num_classes),
            "seed": rng.randrange(2**32),
            "steps": rng.randint(1, 9),
            "guidance_scale": rng.choice([0, 1, 1.5, 7]),
            "guidance_interval": rng.choice([[0, 999], [200, 800]]),
            "cache_interval": rng.randint(1, 3),
            "sampler": rng.choice(DIFFUSION_SAMPLERS),
        }
        for _ in range(NEIGHBOURS)
    ]
    alone = draw(real_client, wanted)
    with ThreadPoolExecutor(NEIGHBOURS + 1) as pool:
        bodies = [*crowd[: NEIGHBOURS // 2], wanted, *crowd[NEIGHBOURS // 2 :]]
        images = list(pool.map(lambda body: draw(real_client, body), bodies))
    assert images[NEIGHBOURS // 2] == alone
    assert len(set(images)) > NEIGHBOURS // 2  # the crowd did draw pictures of its own


def test_short_cuts_change_the_picture_and_are_told(real_client: httpx.Client) -> None:
    whole = {"class_id": 7, "seed": 42, "steps": 6, "guidance_scale": 2.5}
    drawn = [draw(real_client, whole | cut) for cut in ({}, {"guidance_interval": [300, 700]}, {"cache_interval": 2})]
    assert len(set(drawn)) == 3
    assert draw(real_client, whole | {"guidance_interval": [0, 999], "cache_interval": 1}) == drawn[0]
    told = real_client.post("/generate", json=whole | {"guidance_interval": [300, 700], "cache_interval": 2}).json()
    assert (told["guidance_interval"], told["cache_interval"]) == ([300, 700], 2)
