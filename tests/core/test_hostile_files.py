"""Configurations, indices, lists of names and weights of other code bases that a stranger might have written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from autoencoders import save_autoencoder_kl
from crafted import BROKEN, nested, with_header
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from robuq_core.classes import MAX_NAME, read_names
from robuq_core.decode import load_decoder
from robuq_core.errors import UserError
from robuq_core.files import MAX_TEXT_BYTES, check_torch_archive
from robuq_core.hub import CONFIG_NAME, LIBRARY_NAME, exported_checkpoint, resolve_checkpoint
from robuq_core.models.adapters import read_weights
from robuq_core.models.adapters_files import load_pickle, read_json, tensors_of


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "reader",
    [
        lambda path: read_json(path),
        lambda path: load_decoder(path.parent),
        lambda path: read_weights(path.parent),
    ],
)
def test_broken_json_is_one_line(tmp_path: Path, kind: str, reader: Callable[[Path], object]) -> None:
    path = tmp_path / "config.json"
    path.write_text(BROKEN[kind])
    assert exported_checkpoint(path) is None
    with pytest.raises(UserError) as refused:
        reader(path)
    assert len(str(refused.value).splitlines()) == 1


def test_one_bad_file_does_not_hide_the_good_one(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    write_tiny(good)
    raw = good.read_bytes()
    (tmp_path / "a-deep.safetensors").write_bytes(with_header(raw, lambda _: nested()))
    (tmp_path / "b-huge.safetensors").write_bytes(with_header(raw, lambda inner: inner["model"].update(depth=10**8)))
    (tmp_path / "c-empty.safetensors").touch()
    (tmp_path / "d-folder.safetensors").mkdir()
    (tmp_path / "z-circle.safetensors").symlink_to("z-circle.safetensors")
    assert resolve_checkpoint(tmp_path) == good


@pytest.mark.parametrize(
    "name",
    ["*.safetensors", "?.safetensors", "[a-z].safetensors", "a/../b.safetensors", "..\\x.safetensors",
     "a\n.safetensors", "c:x.safetensors", "weights.bin", ".", 7, None, ["a.safetensors"]],
)  # fmt: skip
def test_a_name_from_the_hub_is_one_file(tmp_path: Path, name: object) -> None:
    config = tmp_path / CONFIG_NAME
    config.write_text(json.dumps({"library_name": LIBRARY_NAME, "checkpoint": name}))
    assert exported_checkpoint(config) is None


def test_a_list_of_names_is_read_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\n" + "x" * (MAX_NAME + 1) + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_names(path)
    with path.open("wb") as stream:
        stream.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(UserError, match=path.name):
        read_names(path)


def test_a_pickle_cannot_claim_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    torch.save({"x_embedder.proj.weight": torch.zeros(1).expand(10**6, 4, 2, 2)}, path)
    table = tensors_of(path, load_pickle(path))
    with pytest.raises(UserError, match=r"x_embedder\.proj\.weight"):
        table["x_embedder.proj.weight"].read()
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
    with pytest.raises(zipfile.BadZipFile, match="data"):
        check_torch_archive(packed)
    with pytest.raises(UserError, match=packed.name):
        read_weights(packed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_out_channels": [2**20, 2**20]}, "weights"),
        ({"block_out_channels": [4] * 5000}, "block_out_channels"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"latent_channels": 2**40}, "AutoencoderKL"),
        ({"block_out_channels": "x"}, "AutoencoderKL"),
    ],
)
def test_the_configuration_of_a_decoder_cannot_ask_for_more_than_its_file_holds(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    pytest.importorskip("diffusers")
    save_autoencoder_kl(tmp_path)
    assert load_decoder(tmp_path).channels
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=named):
        load_decoder(tmp_path)


@pytest.mark.slow
def test_a_decoder_whose_weights_are_not_finite(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    save_autoencoder_kl(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.weight"].reshape(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight"):
        load_decoder(tmp_path)
