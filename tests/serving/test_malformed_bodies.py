"""Whatever a client sends, the answer is its fault or an image: never a 5xx. 2,000 bodies over the routes that draw."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from server.generate import GenerateBody
from server.openai_api import ImagesBody

WORDS = ["png", "webp", "ddim", "tench", "crane", "class_id", "seed", "fake", "b64_json", "auto"]
EDGES = [0, 1, -1, 16, 17, 1000, 2**31, 2**32 - 1, 2**32, 2**63, 2**70, 10**400, 0.5, 1e308, float("nan"), float("inf")]
ACCEPTS = ["", "*/*", "image/png", "image/*;q=", "a/b;q=1;;,", ";,=", "image/webp;q=2", "text/event-stream"]
KEYS = [None, None, "", "a", "b", "x" * 300]
# A time limit would make 504 the right answer now and then.
ROUTES: dict[str, tuple[int, list[str]]] = {
    "/generate": (1200, [name for name in GenerateBody.model_fields if name != "timeout_s"]),
    "/v1/images/generations": (800, [name for name in ImagesBody.model_fields if name != "timeout_s"]),
}


def text(rng: random.Random) -> str:
    alphabet = rng.choice([string.printable, "\0\x7f\ud800\udfff\u2028é漢🐟", "0123456789"])
    return "".join(rng.choices(alphabet, k=rng.choice([0, 1, 3, 20, 300])))


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(EDGES)
    if kind < 6:
        return rng.choice([None, True, False, rng.randint(-2, 20), rng.uniform(-5, 25), rng.choice(WORDS), text(rng)])
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return fields(rng, [*WORDS, "name", "shape", "datatype", "data"], depth + 1)


def fields(rng: random.Random, names: Sequence[str], depth: int = 0) -> dict[str, Any]:
    chosen = rng.choices([*names, "extra", ""], k=rng.randrange(7))
    return {name: value(rng, depth) for name in chosen}


def body(rng: random.Random, names: Sequence[str]) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        content: Any = value(rng)
    else:
        content = fields(rng, names)
        if kind < 6:
            content |= {"prompt": "1"} if "prompt" in names else {"class_id": 1}
    # json.dumps writes NaN, Infinity and lone surrogates, as careless clients do.
    encoded = json.dumps(content).encode()
    return encoded if rng.random() < 0.9 else encoded[: rng.randrange(len(encoded))]


@pytest.mark.parametrize("path", ROUTES)
def test_bad_bodies_are_the_clients_fault(client: httpx.Client, path: str) -> None:
    count, names = ROUTES[path]
    seen = set()
    for seed in range(count):
        rng = random.Random(seed)
        content = body(rng, names)
        headers = {"Accept": rng.choice(ACCEPTS)}
        if (key := rng.choice(KEYS)) is not None:
            headers["Idempotency-Key"] = key
        answer = client.post(path, content=content, headers=headers)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404, 406, 422), (seed, content)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["code"]
            assert error["message"]
            assert len(answer.content) < 2000, (seed, content)
    assert len(seen) > 1  # not all of them are wrong
