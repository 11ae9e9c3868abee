"""Conversion keeps full precision bit for bit; packing without training is packing, and says what it cost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY, write_tiny
from typer.testing import CliRunner

from robuq_core.checkpoint import CheckpointError, Description, read_checkpoint, read_header, write_checkpoint
from robuq_core.cli import app
from robuq_core.config import DecoderKind, DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.convert import (
    METHOD,
    convert_full_precision,
    pack_untrained,
    untrained_quant,
)
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.adapters import load_dit, save_official
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import quantize_model

CONFIG = ModelConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=1, num_classes=6, learn_sigma=True
)
run = CliRunner().invoke


def save_random(path: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    model = DiT(CONFIG.model_copy(update=changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_official(model, path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_random(tmp_path / "model.pt")


def test_full_precision_survives_every_way(source: Path, tmp_path: Path) -> None:
    convert_full_precision(source, tmp_path / "folder.v1")  # a dot alone is no suffix
    convert_full_precision(tmp_path / "folder.v1", tmp_path / "back.PT")
    convert_full_precision(tmp_path / "folder.v1", tmp_path / "copy")
    first, second = (torch.load(path)["ema"] for path in (source, tmp_path / "back.PT"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Mapped tensors are written alone, not with the file that they lie in.
    assert (tmp_path / "back.PT").stat().st_size == pytest.approx(source.stat().st_size, rel=0.01)
    convert_full_precision(tmp_path / "back.PT", tmp_path / "back.PT")  # onto itself
    assert all(torch.equal(first[key], tensor) for key, tensor in torch.load(tmp_path / "back.PT")["ema"].items())
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (tmp_path / "folder.v1" / weights).read_bytes()


@pytest.mark.parametrize("planes", [1, 3])
def test_packing_untrained_is_packing_the_fake_quantised_model(source: Path, tmp_path: Path, planes: int) -> None:
    quant = QuantConfig(activation_bits=4, rank=3, weight_planes=planes, bits={"blocks.1.mlp.fc1": 2})
    result = pack_untrained(source, tmp_path / "streamed.safetensors", quant)
    _, model = load_dit(source)
    about = Description(quant, DiffusionConfig(), SamplerConfig())
    header = write_checkpoint(tmp_path / "whole.safetensors", quantize_model(model, quant), about)
    assert result.header.tensors == header.tensors
    assert result.header.provenance["method"] == METHOD
    assert result.header.provenance["source"] == {"name": "model.pt", "layout": "official"}
    assert read_header(tmp_path / "streamed.safetensors") == result.header


def test_the_error_is_that_of_the_packed_file(source: Path, tmp_path: Path) -> None:
    """Measured again from what was written, on other inputs."""
    path = tmp_path / "packed.safetensors"
    result = pack_untrained(source, path, untrained_quant(2, 8, rank=4))
    checkpoint, (_, original) = read_checkpoint(path), load_dit(source)
    packed = PackedDiT(checkpoint.header.model, checkpoint.dense, checkpoint.layers, ReferenceBackend())
    torch.manual_seed(1)
    x, timesteps = torch.randn(32, 3, 8, 8), torch.randint(0, 1000, (32,))
    classes = torch.randint(0, 6, (32,))
    with torch.no_grad():
        expected = original(x, timesteps, classes)[:, :3]
        output = packed.forward(x, timesteps.tolist(), classes.tolist())[:, :3]
    measured = float((output - expected).norm() / expected.norm())
    assert result.relative_error == pytest.approx(measured, rel=0.4)


def test_a_network_that_predicts_zeros_has_no_relative_error(tmp_path: Path) -> None:
    save_official(DiT(CONFIG), tmp_path / "fresh.pt")
    result = pack_untrained(tmp_path / "fresh.pt", tmp_path / "fresh.safetensors", QuantConfig(rank=2))
    assert result.relative_error is None
    assert result.header.provenance["relative_error_on_random_inputs"] is None
    assert "predicts only zeros" in result.warning
    assert "%" not in result.warning


def test_what_does_not_fit_is_said_before_the_work(source: Path, tmp_path: Path) -> None:
    target, done = tmp_path / "packed.safetensors", []
    for error, message, options in (
        (CheckpointError, "class_names: 2 names for 6 classes", {"class_names": ("a", "b")}),
        (ValueError, r"quant\.bits names layers", {"quant": QuantConfig(rank=4, bits={"blocks.9.mlp.fc1": 2})}),
        (ValueError, "rank must be", {"quant": QuantConfig(rank=64)}),
    ):
        with pytest.raises(error, match=message):
            pack_untrained(source, target, **{"quant": QuantConfig(rank=4), **options}, on_layer=done.append)
    assert not done
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_command_packs_and_warns(source: Path, tmp_path: Path) -> None:
    names, target = tmp_path / "names.txt", tmp_path / "packed.SafeTensors"
    names.write_text("\n".join(f"kind {i}" for i in range(6)))
    result = run(app, ["convert", str(source), str(target), "--ptq", "--rank", "4", "--steps", "3", "--sampler", "ddpm",
                       "--class-names", str(names), "--flavour", "diffusers", "--weight-planes", "2"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: quantised without training" in result.stderr
    header = read_header(target)
    assert (header.quant.weight_planes, header.quant.activation_bits, header.quant.adaln_bits) == (2, 8, 8)
    assert header.sampler == SamplerConfig(steps=3, sampler="ddpm")
    assert header.model == CONFIG.model_copy(update={"flavour": "diffusers"})
    assert header.class_names[4] == "kind 4"
    sampled = run(app, ["sample", "4", "-c", str(target), "--out", str(tmp_path / "drawn"), "--seed", "1"])
    assert sampled.exit_code == 0, sampled.output
    assert len(list((tmp_path / "drawn").iterdir())) == 1
    assert "weight_planes 2" in run(app, ["inspect", str(target)]).output.replace("\n", " ")


@pytest.mark.parametrize(
    ("channels", "said", "expected"),
    [(1, None, "pixels"), (3, None, "pixels"), (3, "latent", "latent"), (4, None, "latent"), (1, "latent", "latent")],
)
def test_command_says_what_the_model_draws(tmp_path: Path, channels: int, said: str | None, expected: str) -> None:
    source, target = save_random(tmp_path / "model.pt", in_channels=channels), tmp_path / "packed.safetensors"
    options = [] if said is None else ["--decoder-kind", said]
    result = run(app, ["convert", str(source), str(target), "--ptq", *options])
    assert result.exit_code == 0, result.output
    assert read_header(target).decoder == expected


@pytest.mark.parametrize(
    ("channels", "said", "message"),
    [(2, None, "in_channels 2"), (4, "pixels", "not 4; give latent")],
)
def test_pictures_that_are_neither_grey_nor_rgb_are_refused_before_the_work(
    tmp_path: Path, channels: int, said: DecoderKind | None, message: str
) -> None:
    source, done = save_random(tmp_path / "model.pt", in_channels=channels), []
    with pytest.raises(CheckpointError, match=message):
        pack_untrained(source, tmp_path / "packed.safetensors", QuantConfig(rank=4), decoder=said, on_layer=done.append)
    assert not done
    about = Description(QuantConfig(rank=4), DiffusionConfig(), SamplerConfig(), decoder=said)
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "packed.safetensors", quantize_model(load_dit(source)[1], about.quant), about)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "options",
    ["--weight-planes 2", "--activation-bits 8", "--rank 4", "--decoder-kind latent",
     "--steps 5", "--guidance-scale 2", "--sampler ddim", "--class-names absent.txt"],
)  # fmt: skip
def test_command_ignores_no_option_of_packing(source: Path, tmp_path: Path, options: str) -> None:
    result = run(app, ["convert", str(source), str(tmp_path / "copy.pt"), *options.split()])
    assert result.exit_code == 2
    assert result.stderr == f"error: {options.split()[0]} is only for --ptq; remove it\n"
    assert not (tmp_path / "copy.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt", "out.safetensors"], "only --ptq writes a packed file"),
        (["model.pt", "out.safetensors", "--ptq", "--vae", "nope"], "--vae is only for a diffusers folder"),
        (["model.pt", "out.safetensors", "--ptq", "--class-names", "absent.txt"], "cannot read absent.txt ([Errno 2]"),
        (["model.pt", "out.safetensors", "--ptq", "--class-names", "model.pt"], "give a UTF-8 text file"),
        (["model.pt", "out.bin"], "whose name cannot end in .bin"),
        (["model.pt", "out.pth.tar"], "whose name cannot end in .tar"),
        (["model.pt", "out.pt", "--ptq"], "a packed file, whose name ends in .safetensors"),
        (["absent.pt", "out.safetensors", "--ptq"], "no such file"),
        (["model.pt", "copy.pt", "--vae", "vae"], "contains no decoder"),
        (["model.pt", "folder", "--vae", "vae"], "cannot be read as JSON"),
    ],
)
def test_command_names_mistakes(
    source: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(source.parent)
    result = run(app, ["convert", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert [path.name for path in source.parent.iterdir()] == ["model.pt"]


def test_the_command_renews_an_old_packed_file(tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    write_tiny(old)
    with safe_open(old, "pt") as file:
        header = json.loads(file.metadata()["robuq"])
    save_file(load_file(old), old, metadata={"robuq": json.dumps({**header, "format_version": 2})})
    refused = run(app, ["convert", str(old), str(new), "--heads", "2"])
    assert refused.exit_code == 2
    assert "--heads" in refused.stderr
    done = run(app, ["convert", str(old), str(new)])
    assert done.exit_code == 0, done.output
    assert read_header(new).model == TINY


def test_position_tables_are_this_projects_own_in_a_packed_file(tmp_path: Path) -> None:
    """A packed file has no positions: what it computes must be what the source held."""
    config = CONFIG.model_copy(update={"position_scale": 20.0})
    model = DiT(config)
    save_official(model, tmp_path / "model.pt")
    result = pack_untrained(tmp_path / "model.pt", tmp_path / "packed.safetensors", QuantConfig(rank=2))
    assert result.header.model.position_scale == 20
    with pytest.raises(WeightsError, match="position_scale of 1"):
        convert_full_precision(tmp_path / "model.pt", tmp_path / "folder")
