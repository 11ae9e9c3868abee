"""POST /generate as clients see it: answers, negotiation, class names, and the one shape of every error."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robuq_core.images import encode_image
from robuq_core.params import RowSpec
from server.classes import ClassIndex
from server.errors import ApiError
from server.fake import FakeRow, FakeSampler
from server.generate import GenerateBody
from server.service import Parts, json_parts

NAMES = ("tench, Tinca tinca", "crane", "crane, derrick", "", "maillot", "maillot, tank suit")
ZOO = (
    "shark",
    "great white shark",
    "sharksucker",
    "tiger shark, Galeocerdo cuvieri",
    "loan shark",
    "goldfish",
    "golden retriever",
    "Labrador retriever",
    "12 angry men",
)


def test_whole_names_win_over_synonyms() -> None:
    index = ClassIndex(NAMES, 6)
    assert index.of_request(None, "tinca_tinca") == 0
    assert index.of_request(None, "crane") == 1
    assert index.of_request(None, "Crane, Derrick") == 2
    assert index.of_request(None, "tank suit") == 5
    assert index.name(3) == index.name(99) == ""


def test_a_checkpoint_without_names_takes_ids_only() -> None:
    index = ClassIndex((), 6)
    assert index.of_request(5, None) == 5
    with pytest.raises(ApiError, match="no class names"):
        index.of_request(None, "tench")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("shark", [0, 2, 4, 3, 1]),  # whole, beginning, then words: the shorter first
        ("SHARK", [0, 2, 4, 3, 1]),
        ("retr", [6, 7]),
        ("white_shark", [1]),
        ("cuvieri", [3]),
        ("hark", [0, 4, 2, 3, 1]),
        ("goldfsh", [5]),
        ("goldn retreiver", [6]),
        ("2", [2, 8]),
        ("8", [8]),
        ("99999999999999999999", []),
        ("zzzz", []),
        ("", list(range(9))),
        ("  ", list(range(9))),
    ],
)
def test_a_search_ranks(query: str, expected: list[int]) -> None:
    assert ClassIndex(ZOO, 9).search(query, 20) == expected
    assert ClassIndex(ZOO, 9).search(query, 2) == expected[:2]


@given(query=st.text(max_size=30), limit=st.integers(1, 12))
def test_a_search_finds_each_class_once_and_no_more_than_asked(query: str, limit: int) -> None:
    found = ClassIndex(ZOO, 9).search(query, limit)
    assert len(found) == len(set(found)) <= limit
    assert all(0 <= class_id < 9 for class_id in found)


@given(class_id=st.sampled_from([0, 1, 2, 4, 5, 6, 7, 8]), drop=st.integers(0, 30))
def test_a_name_with_one_letter_missing_is_found(class_id: int, drop: int) -> None:
    name = ZOO[class_id]
    cut = drop % len(name)
    assert class_id in ClassIndex(ZOO, 9).search(name[:cut] + name[cut + 1 :], 9)


SEED_LIMIT = 2**32


def picture(class_id: int, seed: int, steps: int = 4, guidance_scale: float = 1.5) -> bytes:
    sampler = FakeSampler()
    return encode_image(sampler.decode(FakeRow(RowSpec(class_id, seed, steps, guidance_scale, "ddim"))), "png")


def error_of(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error: dict[str, str] = answer.json()["error"]
    assert set(error) - {"field"} == {"code", "message"}
    return error


def test_a_class_id_alone_works(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"class_id": 2})
    assert answer.status_code == 200
    body = answer.json()
    assert 0 <= body["seed"] < SEED_LIMIT
    assert body == {
        "images": [base64.b64encode(picture(2, body["seed"])).decode()],
        "seed": body["seed"],
        "class_id": 2,
        "class_name": "great white shark",
        "steps": 4,
        "guidance_scale": 1.5,
        "guidance_interval": [0, 999],
        "cache_interval": 1,
        "sampler": "ddim",
        "format": "png",
        "timings": body["timings"],
    }
    timings = body["timings"]
    assert timings["queue_s"] + timings["inference_s"] + timings["decode_s"] == pytest.approx(timings["total_s"])
    assert answer.headers["x-seed"] == str(body["seed"])
    for name in ("queue", "inference", "total"):
        assert float(answer.headers[f"x-{name}-time"]) == pytest.approx(timings[f"{name}_s"], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 41, SEED_LIMIT - 2])
def test_image_i_is_the_image_of_seed_plus_i(client: httpx.Client, seed: int) -> None:
    options = {"class_id": 1, "steps": 3, "guidance_scale": 4, "sampler": "ddpm"}
    together = client.post("/generate", json=options | {"seed": seed, "num_images": 16}).json()
    assert (options | {"seed": seed}).items() <= together.items()
    for i in (0, 1, 2, 15):
        alone = client.post("/generate", json=options | {"seed": (seed + i) % SEED_LIMIT}).json()
        assert alone["images"] == [together["images"][i]]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_every_format_as_json_and_raw(client: httpx.Client, image_format: str) -> None:
    request = {"class_id": 3, "seed": 9}
    answer = client.post("/generate", json=request | {"format": image_format})
    assert answer.json()["format"] == image_format
    encoded = base64.b64decode(answer.json()["images"][0])
    image = Image.open(io.BytesIO(encoded))
    assert (image.format, image.size, image.mode) == (image_format.upper(), (32, 32), "RGB")

    raw = client.post("/generate", json=request, headers={"Accept": f"image/{image_format}"})
    assert raw.headers["content-type"] == f"image/{image_format}"
    assert raw.content == encoded
    assert raw.headers["x-seed"] == "9"
    assert float(raw.headers["x-total-time"]) > 0


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json, image/png", "application/json"),
        ("image/*", "image/png"),
        ("IMAGE/WEBP", "image/webp"),
        ("image/png;q=0, image/*", "image/jpeg"),
        ("image/jpeg;q=0.5, image/webp;q=0.9, */*;q=0.1", "image/webp"),
        ("text/html, image/webp, */*;q=0.8", "image/webp"),
        ("text/html", None),
        ("image/png;q=zero", None),
    ],
)
def test_accept_decides_on_the_answer(client: httpx.Client, accept: str, expected: str | None) -> None:
    answer = client.post("/generate", json={"class_id": 0}, headers={"Accept": accept})
    if expected is None:
        assert error_of(answer, 406)["code"] == "not_acceptable"
    else:
        assert answer.headers["content-type"] == expected


def test_a_raw_answer_holds_one_image_of_the_asked_format(client: httpx.Client) -> None:
    raw = {"Accept": "image/png"}
    error = error_of(client.post("/generate", json={"class_id": 0, "num_images": 2}, headers=raw), 422)
    assert error["field"] == "num_images"
    error = error_of(client.post("/generate", json={"class_id": 0, "format": "webp"}, headers=raw), 422)
    assert error["field"] == "format"
    either = client.post("/generate", json={"class_id": 0, "format": "webp"}, headers={"Accept": "image/*"})
    assert either.headers["content-type"] == "image/webp"


def test_class_names_that_do_not_decide(client: httpx.Client) -> None:
    error = error_of(client.post("/generate", json={"class_name": "crane"}), 422)
    assert error["field"] == "class_name"
    assert "3, 4" in error["message"]
    error = error_of(client.post("/generate", json={"class_name": "goldfsh"}), 422)
    assert "goldfish" in error["message"]
    error = error_of(client.post("/generate", json={"class_name": "shark"}), 422)
    assert "great white shark" in error["message"]


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"class_id": -1}, "class_id", "from 0 to 4"),
        ({"class_id": 10**30}, "class_id", "from 0 to 4"),
        ({"class_id": None}, "class_id", "class_id or class_name"),
        ({"class_name": "tench"}, "class_id", "not both"),
        ({"class_id": None, "class_name": ""}, "class_name", "1 to 200"),
        ({"num_images": 17}, "num_images", "from 1 to 16"),
        ({"steps": "20"}, "steps", "from 1 to 1000"),
        ({"guidance_scale": 20.5}, "guidance_scale", "from 0 to 20"),
        ({"guidance_interval": [500, 400]}, "guidance_interval", "the lower one first"),
        ({"cache_interval": 0}, "cache_interval", "from 1 to 1000"),
        ({"seed": 2**53}, "seed", "from -1 to 9007199254740991"),
        ({"sampler": "euler"}, "sampler", "ddpm, ddim, dpmsolver++"),
        ({"format": "gif"}, "format", "png, jpeg, webp"),
        ({"prompt": "a cat"}, "prompt", "class_name"),
    ],
)
def test_422_names_the_field_and_what_it_allows(
    client: httpx.Client, change: dict[str, Any], field: str, allowed: str
) -> None:
    error = error_of(client.post("/generate", json={"class_id": 1} | change), 422)
    assert (error["code"], error["field"]) == ("invalid_request", field)
    assert allowed in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b"null", b'{"class_id": 1', b"\xff\xfe", b"[" * 9000, b'{"a":' * 9000, b'{"class_id":1}x'],
)
def test_a_body_that_is_no_json_object(client: httpx.Client, body: bytes) -> None:
    assert error_of(client.post("/generate", content=body), 422)["field"] == "body"


def test_curl_needs_no_content_type(client: httpx.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/generate", content=b'{"class_id": 1}', headers=form).status_code == 200


def test_long_bodies_are_refused_unread_and_while_read(client: httpx.Client) -> None:
    assert error_of(client.post("/generate", content=b" " * 70_000), 413)["code"] == "body_too_large"

    def chunks() -> Any:
        for _ in range(80):
            yield b" " * 1000

    assert error_of(client.post("/generate", content=chunks()), 413)["code"] == "body_too_large"


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    for path, method in (("/health", "GET"), ("/generate", "POST"), ("/nowhere", "GET")):
        answer = client.request(method, path, headers={"X-Request-Id": "trace-7/a"})
        assert answer.headers["x-request-id"] == "trace-7/a"
    made = [
        client.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 999)
    ]
    assert len(set(made)) == 3
    assert all(len(request_id) == 32 for request_id in made)


def test_the_schema_of_the_route_is_that_of_the_body(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    route = document["paths"]["/generate"]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(GenerateBody.model_fields)
    assert body["properties"]["class_id"]["anyOf"][0]["maximum"] == 4
    assert {"200", "406", "413", "422", "429", "500", "503", "504"} <= set(route["responses"])
    content = set(route["responses"]["200"]["content"])
    assert content == {"application/json", "image/png", "image/jpeg", "image/webp", "text/event-stream"}


def test_a_long_answer_is_sent_in_parts_and_a_short_one_whole() -> None:
    """So that no other request waits until megabytes have been copied."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def answer(size: int) -> list[int]:
        sent.clear()
        parts = json_parts("images", [b"A" * size] * 16, {"seed": 1})
        await Parts(parts, "application/json", {})({}, None, send)  # type: ignore[arg-type]
        content = b"".join(message.get("body", b"") for message in sent)
        assert json.loads(content) == {"images": ["A" * size] * 16, "seed": 1}
        headers = dict(sent[0]["headers"])
        assert int(headers[b"content-length"]) == len(content)
        return [len(message["body"]) for message in sent[1:]]

    assert max(asyncio.run(answer(100_000))) == 100_000
    assert len(asyncio.run(answer(10))) == 1
