"""What a client meets of each kind of model; the bundled one gives the same image alone and in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_harness import Engine, live_server, outcome, running_engine
from tiny import TINY, tiny_model

from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.config import DIFFUSION_SAMPLERS, DiffusionConfig, PredictionType, QuantConfig, SamplerConfig
from robuq_core.params import RowSpec
from robuq_core.pipeline import Row, Sampler
from server.request import Cancelled, Event

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


CROWD = 24


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    samplers = [Sampler.from_checkpoint(threads=1) for _ in range(2)]
    with running_engine(*samplers, max_batch_rows=12, max_queue_images=256) as engine:
        yield engine


def random_spec(rng: random.Random, sampler: str, classes: int) -> RowSpec:
    return RowSpec(
        class_id=rng.randrange(classes),
        seed=rng.randrange(2**32),
        steps=rng.randint(1, 8),
        guidance_scale=rng.choice([0.0, 1.0, 1.5, 4.0]),
        sampler=sampler,  # type: ignore[arg-type]
        cache_interval=rng.choice([1, 1, 2, 3]),
    )


def draw(engine: Engine, spec: RowSpec) -> bytes:
    return engine.submit([spec], "png").future.result(120).images[0]


def test_alone_and_in_a_watched_and_mixed_crowd(engine: Engine) -> None:
    rng = random.Random(11)
    wanted = [random_spec(rng, sampler, engine.model.num_classes) for sampler in DIFFUSION_SAMPLERS]
    alone = [draw(engine, spec) for spec in wanted]
    heard: list[Event] = []
    for turn in range(3):
        crowd = [random_spec(rng, rng.choice(DIFFUSION_SAMPLERS), engine.model.num_classes) for _ in range(CROWD)]
        jobs = [
            engine.submit([spec], "png", preview_every=1 + i % 3, on_event=heard.append if i % 2 else None)
            for i, spec in enumerate([*crowd, *wanted])
        ]
        # Some leave before they are done, which changes the batch of those who stay.
        for job in jobs[turn:CROWD:5]:
            engine.cancel(job)
        assert [job.future.result(120).images[0] for job in jobs[CROWD:]] == alone
        assert {type(outcome(job)) for job in jobs[:CROWD]} <= {type(None), Cancelled}
    assert any(event.preview for event in heard)


def test_images_of_one_request_are_those_of_single_requests(engine: Engine) -> None:
    rng = random.Random(12)
    specs = [random_spec(rng, rng.choice(DIFFUSION_SAMPLERS), engine.model.num_classes) for _ in range(10)]
    together = engine.submit(specs, "png").future.result(120).images
    assert list(together) == [draw(engine, spec) for spec in specs]
