"""Latents are what the VAE's encoder says of each image and of its mirror, and a DiT trains on them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import CLASSES, PER_CLASS, make_config, merged, state_of, train
from tiny_vae import write_vae
from torch import Tensor

from robuq_core.checkpoint import read_header
from robuq_core.pipeline import Sampler
from train.config import TrainConfig
from train.data import BatchSource, DataError, LatentDataset, load_dataset, open_dataset, prepare
from train.data.latents import LatentEncoder
from train.run import Run

CELLS, PIXELS = 4, 8
SHIFT = torch.tensor([1.0] * 4 + [0.0] * 4).reshape(1, 1, 8, 1, 1)  # of means, not of deviations


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae"))


def latent_config(root: Path, vae: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    own = {
        "data": {"vae": str(vae)},
        "model": {"in_channels": 4, "input_size": CELLS, "patch_size": 2},
        "diffusion": {"clip_sample": False},
    }
    return make_config(root, merged(own, changes or {}))


def opened(config: TrainConfig) -> LatentDataset:
    dataset = open_dataset(config, prepare(config, lambda _: None))
    assert isinstance(dataset, LatentDataset)
    return dataset


def encode(vae: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the encoder for float images in [-1, 1]."""
    with torch.inference_mode():
        normal = LatentEncoder(vae).vae.encode(images).latent_dist
    return normal.mean, normal.std


def test_moments_are_the_encoders_of_each_image_and_its_mirror(tmp_path: Path, vae: Path) -> None:
    config = latent_config(tmp_path, vae)
    dataset = opened(config)
    images = load_dataset(config.data.path, PIXELS, CLASSES)
    assert dataset.moments.shape == (CLASSES * PER_CLASS, 2, 8, CELLS, CELLS)
    assert dataset.scaling_factor == 0.5
    assert torch.equal(dataset.labels, images.labels)
    pixels = images.images.float() / 127.5 - 1
    for mirror, side in enumerate((pixels, pixels.flip(-1))):
        mean, deviation = encode(vae, side)
        stored = dataset.moments[:][:, mirror].float()
        torch.testing.assert_close(stored[:, :4], mean, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(stored[:, 4:], deviation, atol=2e-3, rtol=2e-3)
    assert float((dataset.moments[:][:, 0] - dataset.moments[:][:, 1]).abs().max()) > 0.01


def test_without_flips_no_mirrors_are_kept(tmp_path: Path, vae: Path) -> None:
    assert opened(latent_config(tmp_path, vae, {"data": {"flip_probability": 0}})).moments.shape[1] == 1


@given(step=st.integers(0, 10**5), flip=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_batch_draws_from_the_normal_of_the_right_side(step: int, flip: float) -> None:
    mirrors = torch.tensor([10.0, -10.0]).reshape(1, 2, 1, 1, 1).expand(6, 2, 4, 2, 2)
    means = mirrors + torch.arange(6.0).reshape(6, 1, 1, 1, 1) / 10
    moments = torch.cat([means, torch.full_like(means, 1e-3)], dim=2).half()
    dataset = LatentDataset(moments + 3 * SHIFT.half(), torch.arange(6), scaling_factor=0.5, shift_factor=3.0)
    source = BatchSource(dataset, flip, 6, seed=1)
    latents, labels = source.batch(step)
    assert latents.shape == (6, 4, 2, 2)
    sides = latents.mean(dim=(1, 2, 3)) / 0.5 - labels / 10
    assert torch.allclose(sides.abs(), torch.tensor(10.0), atol=0.05)
    assert flip == 0.5 or bool(((sides < 0) == bool(flip)).all())
    assert float(latents.flatten(1).std(dim=1).min()) > 0  # noise was added
    again, _ = BatchSource(dataset, flip, 6, seed=1).batch(step)
    assert torch.equal(latents, again)
    shares = [source.batch(step, rank, 3)[0] for rank in range(3)]
    assert torch.equal(torch.cat(shares), latents)


def test_a_teacher_trains_on_latents(tmp_path: Path, vae: Path) -> None:
    config = latent_config(tmp_path, vae, {"class_init": "pca", "teacher": {"steps": 3}})
    train(config)
    state = state_of(config)
    assert state.step == 3
    assert state.history[0]["config"]["data"]["vae"] == vae.name
    assert Run(config).teacher().config.in_channels == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_are_packed_as_latents_however_many_channels_they_have(tmp_path: Path, channels: int) -> None:
    vae = write_vae(tmp_path / "vae", channels=channels)
    config = latent_config(tmp_path, vae, {"model": {"in_channels": channels}})
    for stage in ("teacher", "qat", "export"):
        train(config, stage)
    header = read_header(Run(config).path("export"))
    assert (header.model.in_channels, header.decoder) == (channels, "latent")
    assert Sampler.from_checkpoint(Run(config).path("export"), decoder=vae).image_size == PIXELS


def test_photos_of_a_latent_run_are_read_afresh(tmp_path: Path, vae: Path) -> None:
    config = latent_config(tmp_path, vae)
    photos = Run(config).photos(3)
    assert photos.images.shape == (3, 3, PIXELS, PIXELS)
    whole = load_dataset(config.data.path, PIXELS, CLASSES)
    assert all(any(torch.equal(image, other) for other in whole.images) for image in photos.images[:])


def test_another_vae_makes_other_latents(tmp_path: Path, vae: Path) -> None:
    before = opened(latent_config(tmp_path, vae)).moments[:]
    other = latent_config(tmp_path, write_vae(tmp_path / "other", seed=1))
    notes: list[str] = []
    prepare(other, notes.append)
    assert notes[0] == "prepare: made again, as data.vae has other content"
    assert not torch.equal(opened(other).moments[:], before)


def test_a_pipeline_folder_holds_its_vae(tmp_path: Path, vae: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(vae)
    assert opened(latent_config(tmp_path, tmp_path / "pipeline")).moments.shape[-1] == CELLS


def test_folders_of_no_use_are_named(tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, expected: str, **changes: Any) -> None:
        config = latent_config(tmp_path, folder, changes)
        with pytest.raises(DataError, match=expected) as caught:
            prepare(config, lambda _: None)
        assert "\n" not in str(caught.value)
        assert not (config.run_dir / "data" / "index.json").exists()

    refused(tmp_path / "absent", "not the folder of an AutoencoderKL")
    refused(vae, "has 4 latent channels but model.in_channels is 3", model={"in_channels": 3})
    bad = tmp_path / "bad"
    bad.mkdir()
    settings = json.loads((vae / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(settings))
    refused(bad, "not a readable AutoencoderKL")
    (bad / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    refused(bad, "not a readable AutoencoderKL")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(vae, r"pip install '\.\[vae\]'")


def test_moments_do_not_depend_on_the_images_beside(vae: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, PIXELS, PIXELS), dtype=np.uint8)
    encoder = LatentEncoder(vae)
    whole = encoder.moments(images, 2)
    np.testing.assert_allclose(encoder.moments(images[2:3], 2)[0], whole[2], atol=2e-3, rtol=2e-3)
