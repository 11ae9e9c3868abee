"""Checkpoints of latents behind the server: decoded off the step loop, alike in a crowd, on replicas, after a swap."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from autoencoders import IMAGE_SIZE, LATENT, save_autoencoder_kl, save_autoencoder_tiny, write_latent
from PIL import Image
from serving_harness import Engine, live_server, sample, started_engine, until
from tiny import TINY, write_tiny

from robuq_core.checkpoint import CheckpointError
from robuq_core.export_hub import export_hub
from robuq_core.pipeline import RowSpec, Sampler
from server.keys import create_key
from server.launch import memory_file
from server.worker import load_sampler

CROWD = 12


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


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    paths = {"checkpoint": folder / "latent.safetensors", "decoder": folder / "autoencoder"}
    options = {"replicas": 2, "threads": 2, "max_queue_images": 64, "decode_threads": 3}
    with started_engine(loaded, **paths, **options) as engine:
        until(lambda: engine.status == "ready")
        yield engine


def specs(count: int) -> list[RowSpec]:
    return [RowSpec(i % LATENT.num_classes, i, 1 + i % 3, 1.0 + i % 2, "ddim") for i in range(count)]


def test_pictures_are_those_of_the_sampler_alone_and_in_a_crowd(engine: Engine, folder: Path) -> None:
    wanted = specs(CROWD)
    alone = Sampler.from_checkpoint(folder / "latent.safetensors", decoder=folder / "autoencoder", threads=1)
    jobs = [engine.submit([spec], "png") for spec in wanted]
    for spec, job in zip(wanted, jobs, strict=True):
        row = alone.start(spec)
        alone.finish([row])
        (encoded,) = job.future.result(60).images
        drawn = np.asarray(Image.open(io.BytesIO(encoded)))
        assert drawn.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert np.array_equal(drawn, alone.decode(row))


def test_decoding_has_a_time_of_its_own(engine: Engine) -> None:
    before = sample(engine, "robuq_decode_duration_seconds_count")
    result = engine.submit(specs(2), "png").future.result(60)
    assert result.timings.decode_s > 0
    assert sample(engine, "robuq_decode_duration_seconds_count") == before + 2


def test_a_swap_takes_the_decoder_along(folder: Path, tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.json", "root", scopes=["admin", "generate"])
    options = {"api_keys_file": tmp_path / "keys.json", "checkpoint_dir": folder, "decoder": folder / "autoencoder"}
    with live_server(loaded, checkpoint=folder / "pixels.safetensors", **options) as (client, engine):
        client.headers["Authorization"] = f"Bearer {key}"

        def side_after(name: str) -> int:
            answer = client.post("/admin/checkpoint", json={"path": f"{name}.safetensors"})
            assert answer.status_code == 200, answer.text
            assert client.get("/info").json()["image_size"] == answer.json()["image_size"]
            drawn = client.post("/generate", json={"class_id": 1, "steps": 2}, headers={"Accept": "image/png"})
            width, height = Image.open(io.BytesIO(drawn.content)).size
            assert width == height == answer.json()["image_size"]
            info, served = answer.json(), engine.model
            assert info["decoder"]["name"] == ("pixels" if name == "pixels" else "autoencoder")
            assert info["decoder"]["weight_bytes"] == served.decoder_weight_bytes
            assert (sample(engine, "robuq_decoder_weight_bytes") > 0) == (name == "latent")
            assert sample(engine, "robuq_decoder_weight_bytes") == served.decoder_weight_bytes
            assert sample(engine, "robuq_model_weight_bytes") == served.weight_bytes == info["weight_bytes"]
            return width

        assert [side_after(name) for name in ("latent", "pixels", "latent")] == [
            IMAGE_SIZE,
            TINY.input_size,
            IMAGE_SIZE,
        ]
        until(lambda: engine.idle)


def test_a_swap_to_latents_without_a_decoder_is_told_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.json", "root", scopes=["admin", "generate"])
    options = {"api_keys_file": tmp_path / "keys.json", "checkpoint_dir": folder}
    with live_server(loaded, checkpoint=folder / "pixels.safetensors", **options) as (client, _):
        client.headers["Authorization"] = f"Bearer {key}"
        answer = client.post("/admin/checkpoint", json={"path": "latent.safetensors"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_unusable")
        assert "ROBUQ_DECODER" in answer.json()["error"]["message"]
        assert str(folder) not in answer.text
        assert client.get("/info").json()["checkpoint"] == "pixels"


OPTIONS = {"decoder": None, "backend": "auto", "threads": 1, "number": 0, "replicas": 1}


def test_a_start_without_a_decoder_names_the_setting(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--decoder, ROBUQ_DECODER"):
        loaded({**OPTIONS, "checkpoint": str(folder / "latent.safetensors")})


def test_the_checkpoint_setting_takes_what_the_library_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "f" * 40
    export_hub(folder / "latent.safetensors", tmp_path / commit, licence="mit")
    save_autoencoder_tiny(tmp_path / commit / "vae")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / commit))
    for checkpoint in ("someone/tiny", str(tmp_path / commit)):
        sampler = loaded({**OPTIONS, "checkpoint": checkpoint})
        assert (sampler.checkpoint_name, sampler.decoder.name) == ("latent", "vae")
