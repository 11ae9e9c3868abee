"""Checkpoints of latents behind the server: decoded off the step loop, alike in a crowd, on replicas, after a swap."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from autoencoders import IMAGE_SIZE, LATENT, save_autoencoder_kl, write_latent
from PIL import Image
from serving_harness import Engine, live_server, sample, started_engine, until
from tiny import TINY, write_tiny

from robuq_core.checkpoint import CheckpointError
from robuq_core.pipeline import RowSpec, Sampler
from server.keys import create_key
from server.launch import memory_file
from server.worker import load_sampler

OPTIONS = {"decoder": None, "backend": "auto", "threads": 1, "number": 0, "replicas": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent-serving")
    write_latent(folder / "latent.safetensors")
    write_tiny(folder / "pixels.safetensors")
    save_autoencoder_kl(folder / "autoencoder")
    return folder


def loaded(options: dict[str, Any]) -> Any:
    """A sampler as a worker loads it."""
    return load_sampler({**options, "store": True}, memory_file("weights"))


def test_pictures_are_those_of_the_sampler_and_decoding_has_a_time_of_its_own(folder: Path) -> None:
    paths = {"checkpoint": folder / "latent.safetensors", "decoder": folder / "autoencoder"}
    alone = Sampler.from_checkpoint(paths["checkpoint"], decoder=paths["decoder"], threads=1)
    specs = [RowSpec(i % LATENT.num_classes, i, 1 + i % 3, 1.0 + i % 2, "ddim") for i in range(12)]
    options = {"replicas": 2, "threads": 2, "max_queue_images": 64, "decode_threads": 3}
    with started_engine(loaded, **paths, **options) as engine:
        until(lambda: engine.status == "ready")
        jobs = [engine.submit([spec], "png") for spec in specs]
        results = [job.future.result(60) for job in jobs]
        assert sample(engine, "robuq_decode_duration_seconds_count") == 12
    for spec, result in zip(specs, results, strict=True):
        row = alone.start(spec)
        alone.finish([row])
        drawn = np.asarray(Image.open(io.BytesIO(result.images[0])))
        assert drawn.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert np.array_equal(drawn, alone.decode(row))
        assert result.timings.decode_s > 0


@pytest.fixture
def server(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[httpx.Client, Engine]]:
    """The pixel model, an administrator's client; the parameter is the setting ``decoder``."""
    key = create_key(tmp_path / "keys.json", "root", scopes=["admin", "generate"])
    options = {"api_keys_file": tmp_path / "keys.json", "checkpoint_dir": folder}
    options["decoder"] = folder / request.param if request.param else None
    with live_server(loaded, checkpoint=folder / "pixels.safetensors", **options) as (client, engine):
        client.headers["Authorization"] = f"Bearer {key}"
        yield client, engine


@pytest.mark.parametrize("server", ["autoencoder"], indirect=True)
def test_a_swap_takes_the_decoder_along(server: tuple[httpx.Client, Engine]) -> None:
    client, engine = server
    for name in ("latent", "pixels", "latent"):
        answer = client.post("/admin/checkpoint", json={"path": f"{name}.safetensors"})
        assert answer.status_code == 200, answer.text
        info, served = answer.json(), engine.model
        size = TINY.input_size if name == "pixels" else IMAGE_SIZE
        drawn = client.post("/generate", json={"class_id": 1, "steps": 2}, headers={"Accept": "image/png"})
        assert Image.open(io.BytesIO(drawn.content)).size == (size, size)
        assert client.get("/info").json()["image_size"] == info["image_size"] == size
        decoder = {"name": "pixels" if name == "pixels" else "autoencoder", "weight_bytes": served.decoder_weight_bytes}
        assert info["decoder"] == decoder
        assert (decoder["weight_bytes"] > 0) == (name == "latent")
        assert sample(engine, "robuq_decoder_weight_bytes") == decoder["weight_bytes"]
        assert sample(engine, "robuq_model_weight_bytes") == served.weight_bytes == info["weight_bytes"]


@pytest.mark.parametrize("server", [None], indirect=True)
def test_a_swap_to_latents_without_a_decoder_is_told_and_changes_nothing(
    server: tuple[httpx.Client, Engine], folder: Path
) -> None:
    client, _ = server
    answer = client.post("/admin/checkpoint", json={"path": "latent.safetensors"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_unusable")
    assert "ROBUQ_DECODER" in answer.json()["error"]["message"]
    assert str(folder) not in answer.text
    assert client.get("/info").json()["checkpoint"] == "pixels"


def test_a_start_without_a_decoder_names_the_setting(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--decoder, ROBUQ_DECODER"):
        loaded({**OPTIONS, "checkpoint": str(folder / "latent.safetensors")})
