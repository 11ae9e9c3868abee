"""What a client meets of each kind of DiT: /info says it, requests ask for no more than it can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_harness import live_server
from tiny import TINY, tiny_model

from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.config import DiffusionConfig, PredictionType, QuantConfig, SamplerConfig
from robuq_core.pipeline import Row, Sampler

KINDS: dict[str, tuple[dict[str, Any], PredictionType, SamplerConfig]] = {
    "sit": ({"flavour": "sit"}, "flow", SamplerConfig(sampler="euler", steps=3)),
    "unconditional": ({"num_classes": 0}, "epsilon", SamplerConfig(steps=3, guidance_scale=1)),
    "no null class": ({"null_class": False}, "epsilon", SamplerConfig(steps=3, guidance_scale=1)),
}


def served(folder: Path, kind: str) -> AbstractContextManager[tuple[httpx.Client, Any]]:
    changes, prediction, sampler = KINDS[kind]
    quant = QuantConfig(rank=4)
    about = Description(quant, DiffusionConfig(prediction_type=prediction), sampler)
    write_checkpoint(folder / "x.safetensors", tiny_model(TINY.model_copy(update=changes), quant), about)
    return live_server(Sampler.from_checkpoint(folder / "x.safetensors"), max_batch_rows=8)


@pytest.fixture(scope="module")
def sit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("sit"), "sit") as (client, _):
        yield client


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("none"), "unconditional") as (client, _):
        yield client


def refused(answer: httpx.Response) -> str:
    assert answer.status_code in (400, 422), answer.text
    error = answer.json()["error"]
    return str(error["field"] if isinstance(error, dict) else answer.json()["field"])


def test_a_flow_is_described_and_drawn_with_its_samplers(sit: httpx.Client) -> None:
    info = sit.get("/info").json()
    assert (info["prediction_type"], info["guidance"]) == ("flow", True)
    assert info["samplers"] == ["euler", "heun", "sde"]
    assert info["defaults"]["sampler"] == "euler"
    pictures = set()
    for sampler in info["samplers"]:
        answer = sit.post("/generate", json={"class_id": 3, "seed": 1, "sampler": sampler, "steps": 5})
        assert answer.status_code == 200, answer.text
        assert answer.json()["sampler"] == sampler
        pictures.add(answer.json()["images"][0])
    assert len(pictures) == 3
    body = {"class_id": 3, "seed": 1, "sampler": "heun", "steps": 5}
    assert sit.post("/generate", json=body).json()["images"][0] in pictures


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_a_sampler_of_the_other_process_is_named(sit: httpx.Client, sampler: str) -> None:
    assert refused(sit.post("/generate", json={"class_id": 3, "sampler": sampler})) == "sampler"
    assert refused(sit.post("/v1/images/generations", json={"prompt": "3", "sampler": sampler})) == "sampler"


def test_a_model_without_classes_draws_an_empty_request(unconditional: httpx.Client) -> None:
    info = unconditional.get("/info").json()
    assert (info["num_classes"], info["guidance"], info["prediction_type"]) == (0, False, "epsilon")
    assert unconditional.get("/classes").json()["classes"] == []
    answer = unconditional.post("/generate", json={}).json()
    assert answer["class_id"] is None
    assert answer["guidance_scale"] == 1
    first = unconditional.post("/generate", json={"seed": 5, "num_images": 2}).json()["images"]
    again = unconditional.post("/generate", json={"seed": 6}).json()["images"]
    assert first[0] != first[1] == again[0]
    png = unconditional.post("/generate", json={"seed": 6}, headers={"Accept": "image/png"})
    assert png.content.startswith(b"\x89PNG")
    streamed = unconditional.post("/generate", json={"stream": True, "seed": 6})
    assert "image_generation.completed" in streamed.text


def test_openai_clients_need_no_class_either(unconditional: httpx.Client) -> None:
    openai = unconditional.post("/v1/images/generations", json={"prompt": "anything", "seed": 6})
    assert openai.status_code == 200, openai.text
    assert openai.json()["class_id"] is None
    wrong = unconditional.post("/v1/images/generations", json={"prompt": "anything", "guidance_scale": 2})
    assert refused(wrong) == "guidance_scale"


@pytest.mark.parametrize(
    ("body", "field"),
    [({"class_id": 0}, "class_id"), ({"class_name": "tench"}, "class_name"), ({"guidance_scale": 2}, "guidance_scale")],
)
def test_what_a_model_without_classes_cannot_do_is_named(
    unconditional: httpx.Client, body: dict[str, Any], field: str
) -> None:
    assert refused(unconditional.post("/generate", json=body)) == field


def test_guidance_without_a_null_class_is_refused(tmp_path: Path) -> None:
    with served(tmp_path, "no null class") as (client, _):
        assert client.get("/info").json()["guidance"] is False
        assert refused(client.post("/generate", json={"class_id": 9, "guidance_scale": 2})) == "guidance_scale"
        assert client.post("/generate", json={"class_id": 9}).json()["guidance_scale"] == 1
        assert refused(client.post("/generate", json={"class_id": 10})) == "class_id"


def test_a_picture_that_is_not_finite_is_a_500(
    unconditional: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(row: Row, x: torch.Tensor, x0: torch.Tensor, block_delta: torch.Tensor | None = None) -> None:
        advance(row, torch.full_like(x, torch.nan) if row.spec.seed == 13 else x, x0, block_delta)

    advance = Row.advance
    monkeypatch.setattr(Row, "advance", overflow)
    for headers in ({}, {"Accept": "image/png"}):
        assert unconditional.post("/generate", json={"seed": 13}, headers=headers).status_code == 500
    assert unconditional.post("/v1/images/generations", json={"prompt": "x", "seed": 13}).status_code == 500
    failed = unconditional.post("/generate", json={"seed": 13, "stream": True, "preview_every": 1})
    assert "image_generation.completed" not in failed.text
    assert unconditional.post("/generate", json={"seed": 12}).status_code == 200
