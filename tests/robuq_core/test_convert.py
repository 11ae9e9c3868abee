"""Conversion keeps full precision bit for bit; packing without training is packing, and says what it cost."""

import shlex
from pathlib import Path

import pytest
import torch
from autoencoders import examples, save_autoencoder_tiny
from typer.testing import CliRunner

from robuq_core.checkpoint import CheckpointError, Description, read_checkpoint, read_header, write_checkpoint
from robuq_core.cli import app
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.convert import (
    METHOD,
    PackedResult,
    convert_full_precision,
    pack_untrained,
    quantize_layers,
    relative_error,
    untrained_quant,
)
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.adapters import load_dit, read_weights, save_official
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import quantize_model

CONFIG = ModelConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=1, num_classes=6, learn_sigma=True
)
run = CliRunner().invoke


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "model.pt"
    save_official(model, path)
    return path


def test_full_precision_survives_every_way(source: Path, tmp_path: Path) -> None:
    convert_full_precision(source, tmp_path / "folder")
    convert_full_precision(tmp_path / "folder", tmp_path / "back.pt")
    convert_full_precision(tmp_path / "folder", tmp_path / "copy")
    first, second = torch.load(source), torch.load(tmp_path / "back.pt")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Mapped tensors are written alone, not with the file that they lie in.
    assert (tmp_path / "back.pt").stat().st_size == pytest.approx(source.stat().st_size, rel=0.01)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (tmp_path / "folder" / weights).read_bytes()


def test_a_file_can_be_converted_onto_itself(source: Path) -> None:
    before = torch.load(source)
    convert_full_precision(source, source)
    after = torch.load(source)
    assert all(torch.equal(before[key], after[key]) for key in before)


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


def test_more_planes_and_bits_come_closer(source: Path) -> None:
    weights = read_weights(source)
    dense = {name: weights.tensor(name) for name in weights.shapes if not name.startswith("blocks.")}

    def error(planes: int, bits: int) -> float:
        quant = untrained_quant(planes, bits, rank=4)
        return relative_error(weights, quant, dense, quantize_layers(weights, quant), ReferenceBackend())

    assert error(1, 8) > error(2, 8) > error(3, 8)
    assert error(3, 2) > error(3, 4) > error(3, 8)
    assert error(3, 8) < 0.1


def test_the_error_is_that_of_the_packed_file(source: Path, tmp_path: Path) -> None:
    """Measured again from what was written, on other inputs."""
    path = tmp_path / "packed.safetensors"
    result = pack_untrained(source, path, untrained_quant(2, 8, rank=4))
    checkpoint, (_, original) = read_checkpoint(path), load_dit(source)
    packed = PackedDiT(checkpoint.header.model, checkpoint.dense, checkpoint.layers, ReferenceBackend())
    x, timesteps = torch.randn(32, 3, 8, 8), torch.randint(0, 1000, (32,))
    classes = torch.randint(0, 6, (32,))
    with torch.no_grad():
        expected, output = original(x, timesteps, classes)[:, :3], packed.forward(x, timesteps, classes)[:, :3]
    measured = float((output - expected).norm() / expected.norm())
    assert result.relative_error == pytest.approx(measured, rel=0.4)


def test_a_network_that_predicts_zeros_has_no_relative_error(tmp_path: Path) -> None:
    save_official(DiT(CONFIG), tmp_path / "fresh.pt")
    assert (
        pack_untrained(tmp_path / "fresh.pt", tmp_path / "fresh.safetensors", QuantConfig(rank=2)).relative_error == 0
    )


def test_the_warning_follows_the_error(source: Path, tmp_path: Path) -> None:
    header = pack_untrained(source, tmp_path / "packed.safetensors", untrained_quant(rank=4)).header
    assert "30.0% (RMS) off" in PackedResult(header, 0.3).warning
    assert "noise rather than pictures" in PackedResult(header, 0.3).warning
    assert "pictures will differ" in PackedResult(header, 0.05).warning


def test_what_does_not_fit_is_said_before_the_work(source: Path, tmp_path: Path) -> None:
    target, done = tmp_path / "packed.safetensors", []
    for error, message, options in (
        (CheckpointError, "2 class names for 6 classes", {"class_names": ("a", "b")}),
        (ValueError, r"quant\.bits names layers", {"quant": QuantConfig(rank=4, bits={"blocks.9.mlp.fc1": 2})}),
        (ValueError, "rank must be", {"quant": QuantConfig(rank=64)}),
    ):
        with pytest.raises(error, match=message):
            pack_untrained(source, target, **{"quant": QuantConfig(rank=4), **options}, on_layer=done.append)
    assert not done
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_command_packs_and_warns(source: Path, tmp_path: Path) -> None:
    names, target = tmp_path / "names.txt", tmp_path / "packed.safetensors"
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


def test_command_converts_between_layouts(source: Path, tmp_path: Path) -> None:
    assert run(app, ["convert", str(source), str(tmp_path / "folder")]).exit_code == 0
    assert run(app, ["convert", str(tmp_path / "folder"), str(tmp_path / "back.pt")]).exit_code == 0
    assert torch.equal(torch.load(source)["pos_embed"], torch.load(tmp_path / "back.pt")["pos_embed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt", "out.safetensors"], "is made with --ptq"),
        (["model.pt", "out.pt", "--ptq"], "a packed file ends in .safetensors"),
        (["absent.pt", "out.safetensors", "--ptq"], "no such file"),
        (["model.pt", "copy.pt", "--vae", "vae"], "holds no decoder"),
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


def test_position_tables_are_this_projects_own_in_a_packed_file(tmp_path: Path) -> None:
    """A packed file has no positions: what it computes must be what the source held."""
    config = CONFIG.model_copy(update={"position_scale": 20.0})
    model = DiT(config)
    save_official(model, tmp_path / "model.pt")
    result = pack_untrained(tmp_path / "model.pt", tmp_path / "packed.safetensors", QuantConfig(rank=2))
    assert result.header.model.position_scale == 20
    with pytest.raises(WeightsError, match="position_scale of 1"):
        convert_full_precision(tmp_path / "model.pt", tmp_path / "folder")


def test_the_examples_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = CONFIG.model_copy(update={"in_channels": 4, "num_classes": 300})
    save_official(DiT(config), Path("DiT-XL-2-256x256.pt"))
    save_autoencoder_tiny(Path("vae"))
    for line in examples("weights.md", "sh")[0].splitlines():
        result = run(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, result.output
    first, again = torch.load("DiT-XL-2-256x256.pt"), torch.load("again.pt")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [path.name for path in Path("samples").iterdir()] == ["0000_class207.png"]
