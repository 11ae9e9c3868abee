"""Latents to pictures: what the autoencoder's library gives, the same alone and among others, and clear refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import (
    FACTOR,
    IMAGE_SIZE,
    LATENT,
    LATENT_CHANNELS,
    save_autoencoder_kl,
    save_autoencoder_tiny,
)
from autoencoders import write_latent as write_latent_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_core import decode
from robuq_core.checkpoint import CheckpointError
from robuq_core.decode import DecoderError, LatentDecoder, PixelDecoder, load_decoder, to_pixels
from robuq_core.pipeline import RowSpec, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

SAVERS = {"kl": save_autoencoder_kl, "tiny": save_autoencoder_tiny}


@pytest.fixture(scope="module", params=sorted(SAVERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = SAVERS[request.param]
    return save(tmp_path_factory.mktemp("autoencoder") / request.param)


@pytest.fixture(scope="module")
def latent_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_checkpoint(tmp_path_factory.mktemp("latent") / "latent.safetensors")


def latents(count: int, side: int = LATENT.input_size) -> torch.Tensor:
    return torch.randn(count, LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(3))


def whole_autoencoder(folder: Path) -> torch.nn.Module:
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder).eval()


def test_a_latent_becomes_what_the_library_makes_of_it(folder: Path) -> None:
    decoder, reference = load_decoder(folder), whole_autoencoder(folder)
    assert decoder.name == folder.name
    assert decoder.image_size(8) == 8 * FACTOR
    scaling = {"kl": 0.18215, "tiny": 1.0}[folder.name]
    for latent in latents(3):
        with torch.no_grad():
            expected = reference.decode(latent[None] / scaling).sample[0]
        picture = decoder.decode(latent)
        assert picture.shape == (3, 8 * FACTOR, 8 * FACTOR)
        assert torch.equal(picture, expected)


def test_the_scale_and_shift_are_those_of_the_configuration(tmp_path: Path) -> None:
    folder = save_autoencoder_kl(tmp_path / "shifted", scaling_factor=0.5, shift_factor=0.25)
    (latent,) = latents(1)
    with torch.no_grad():
        expected = whole_autoencoder(folder).decode(latent[None] / 0.5 + 0.25).sample[0]
    assert torch.equal(load_decoder(folder).decode(latent), expected)


@settings(max_examples=5)
@given(count=st.integers(2, 9), threads=st.integers(2, 4))
def test_a_picture_does_not_depend_on_who_else_decodes(folder: Path, count: int, threads: int) -> None:
    decoder = load_decoder(folder)
    samples = latents(count)
    alone = [decoder.decode(sample) for sample in samples]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(decoder.decode, samples))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_tiles_of_convolutions_make_nearly_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_autoencoder_tiny(tmp_path / "tiny")
    (latent,) = latents(1, side=100)
    whole = load_decoder(folder).decode(latent)
    monkeypatch.setattr(decode, "TILE_ABOVE", 150)
    tiled = load_decoder(folder).decode(latent)
    assert not torch.equal(tiled, whole)  # at a tile's edge a convolution sees zeros in place of its neighbours
    assert float((tiled - whole).abs().mean()) < 0.05 * float(whole.std())


def test_tiles_bound_what_an_autoencoder_kl_sees_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TILE_ABOVE", 32)
    decoder = load_decoder(save_autoencoder_kl(tmp_path / "kl"))
    seen: list[int] = []
    decoder.autoencoder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    (small,), (large,) = latents(1, side=16), latents(1, side=20)
    assert decoder.decode(small).shape == (3, 32, 32)
    assert seen == [16]
    assert bool(decoder.decode(large).isfinite().all())
    assert max(seen[1:]) == 8


@pytest.mark.parametrize("tile_above", [1, 19, 20, 47])
def test_tiles_of_any_size_make_a_picture_of_the_same_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tile_above: int
) -> None:
    monkeypatch.setattr(decode, "TILE_ABOVE", tile_above)
    (latent,) = latents(1, side=24)
    tiled = load_decoder(folder).decode(latent)
    assert tiled.shape == (3, 24 * FACTOR, 24 * FACTOR)
    # No tile is left black: its rows vary like those of the first.
    assert float(tiled.std(dim=(0, 2)).min()) > 0.1 * float(tiled.std())


def test_a_decoder_has_no_encoder_in_memory(folder: Path) -> None:
    decoder, whole = load_decoder(folder), whole_autoencoder(folder)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    assert decoder.weight_bytes == size - sum(
        parameter.nbytes for name, parameter in whole.named_parameters() if name.startswith(("encoder.", "quant_conv."))
    )


def test_a_replica_on_the_same_device_is_the_decoder_itself(folder: Path) -> None:
    decoder = load_decoder(folder)
    assert decoder.replica("cpu") is decoder
    elsewhere = decoder.replica("meta")
    assert (elsewhere.device.type, decoder.device.type) == ("meta", "cpu")
    assert elsewhere.image_size(8) == decoder.image_size(8)


def test_pixels_are_cut_and_rounded_as_documented() -> None:
    picture = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert to_pixels(PixelDecoder().decode(picture))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_grey_pixels_are_three_equal_channels() -> None:
    pixels = to_pixels(PixelDecoder(channels=1).decode(torch.linspace(-1, 1, 6).reshape(1, 2, 3)))
    assert (pixels == pixels[..., :1]).all()
    assert (pixels.shape, pixels[0, 0, 0], pixels[1, 2, 0]) == ((2, 3, 3), 0, 255)


# In a sampler.


def test_a_sampler_of_latents_draws_what_its_decoder_makes(folder: Path, latent_checkpoint: Path) -> None:
    sampler = Sampler.from_checkpoint(latent_checkpoint, decoder=folder, backend="reference")
    assert sampler.image_size == IMAGE_SIZE
    images = sampler.generate([1, 2], seed=4, steps=2)
    assert [image.size for image in images] == [(IMAGE_SIZE, IMAGE_SIZE)] * 2
    row = sampler.start(RowSpec(2, 5, 2, sampler.defaults.guidance_scale, sampler.defaults.sampler))
    sampler.finish([row])
    expected = to_pixels(load_decoder(folder).decode(row.x))
    assert np.array_equal(np.asarray(images[1]), expected)
    assert np.array_equal(sampler.decode_estimate(sampler.estimate(row)), to_pixels(sampler.decoder.decode(row.x)))
    assert sampler.timings is not None
    assert sampler.timings.sampling_s > 0
    assert sampler.timings.decode_s > 0


def test_a_loaded_decoder_and_one_beside_the_file_do_as_well(latent_checkpoint: Path, tmp_path: Path) -> None:
    decoder = load_decoder(save_autoencoder_tiny(tmp_path / "vae"))
    given = Sampler.from_checkpoint(latent_checkpoint, decoder=decoder, backend="reference")
    assert given.decoder is decoder
    path = write_latent_checkpoint(tmp_path / "latent.safetensors")
    for source in (path, tmp_path):
        found = Sampler.from_checkpoint(source, backend="reference")
        assert isinstance(found.decoder, LatentDecoder)
        assert found.generate([1], seed=0, steps=1)[0] == given.generate([1], seed=0, steps=1)[0]


# Mistakes.


def test_a_latent_model_without_a_decoder_names_the_setting(latent_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"latent\.safetensors: a latent model without a decoder: .*--decoder"):
        Sampler.from_checkpoint(latent_checkpoint)


def test_a_decoder_for_other_latents_is_refused(latent_checkpoint: Path, tmp_path: Path) -> None:
    folder = save_autoencoder_tiny(tmp_path / "wide", latent_channels=16)
    with pytest.raises(CheckpointError, match=r"latents of 4 channels, but the decoder wide takes 16"):
        Sampler.from_checkpoint(latent_checkpoint, decoder=folder)


def test_no_diffusers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_autoencoder_tiny(tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DecoderError, match=r"from a checkout: pip install '\.\[vae\]'"):
        load_decoder(folder)


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_weights(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def pickle_something(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"decoder.conv_in.weight": Path("/")}, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json in it; give a diffusers folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "field _class_name cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "field _class_name cannot be read"),
        (lambda folder: edit_config(folder, _class_name="UNet2DModel"), "field _class_name is 'UNet2DModel'"),
        (lambda folder: edit_config(folder, out_channels=1), "vae"),
        (lambda folder: edit_config(folder, latents_mean=[0.0] * 4), "latents_mean and latents_std are not supported"),
        (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "weights that cannot be read"),
        (cut_weights, "weights that cannot be read"),
        (drop_a_tensor, r"the weights lack decoder\.conv_in\.weight"),
        (pickle_something, "weights that cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_error(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = save_autoencoder_kl(tmp_path / "vae")
    damage(folder)
    with pytest.raises(DecoderError, match=message):
        load_decoder(folder)
