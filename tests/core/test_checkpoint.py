import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny_model, write_tiny

from robuq_core.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    Description,
    dense_shapes,
    layer_macs,
    layer_shapes,
    read_checkpoint,
    read_header,
    renew_checkpoint,
    write_checkpoint,
)
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.models.dit import DiT
from robuq_core.models.presets import preset
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears
from robuq_core.pipeline import bundled_checkpoint
from robuq_core.quant.choices import ActivationRule


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    return path


def _edit_header(path: Path, **changes: Any) -> None:
    """Rewrite the project's header, leaving the tensors as they are."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["robuq"])
    inner.update(changes)
    save_file(load_file(path), path, metadata={"robuq": json.dumps(inner)})


@pytest.mark.parametrize("quant", [QuantConfig(rank=4), QuantConfig(rank=0, adaln_rank=3, grid="midtread"),
                                   QuantConfig(rank=2, bits={"blocks.1.attn.proj": 3}),
                                   QuantConfig(rank=3, weight_planes=2),
                                   QuantConfig(rank=0, weight_planes=3)])  # fmt: skip
def test_layers_come_back_exactly(tmp_path: Path, quant: QuantConfig) -> None:
    path = tmp_path / "model.safetensors"
    model = write_tiny(path, quant=quant)
    checkpoint = read_checkpoint(path)
    for name, linear in quantizable_linears(model):
        assert isinstance(linear, QuantLinear)
        expected, layer = pack_layer(linear), checkpoint.layers[name]
        for part in ("planar", "alpha", "bias", "signs", "lowrank_a", "lowrank_b"):
            assert torch.equal(getattr(layer, part), getattr(expected, part)), f"{name}.{part}"
        assert len(layer.finer) == len(expected.finer) == quant.weight_planes - 1
        for plane, wanted in zip(layer.finer, expected.finer, strict=True):
            assert torch.equal(plane.planar, wanted.planar)
            assert torch.equal(plane.alpha, wanted.alpha)
        assert (layer.bits, layer.grid) == (expected.bits, expected.grid)
    for name, tensor in checkpoint.dense.items():
        assert torch.equal(tensor, model.get_parameter(name).detach().half().float()), name


def test_header_says_what_the_model_is(packed: Path) -> None:
    header = read_header(packed)
    assert header.model == TINY
    assert header.average_activation_bits == 2
    assert header.bits["blocks.0.adaLN_modulation.1"] == 4
    assert header.provenance == {"seed": 0}
    assert header.class_names[3] == "class 3"


def test_average_bits_follow_the_macs(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    write_tiny(path, quant=QuantConfig(rank=0, bits={"blocks.0.mlp.fc1": 4, "blocks.1.attn.proj": 1}))
    assert read_header(path).average_activation_bits == pytest.approx((24 * 2 + 4 * 2 - 1) / 24)


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_are_refused_until_they_are_converted(packed: Path, tmp_path: Path, version: int) -> None:
    before = read_checkpoint(packed)
    quant = {"activation_bits": 2, "adaln_bits": 4, "attention_bits": 8, "grid": "midrise", "rank": 4, "seed": 0}
    _edit_header(packed, format_version=version, quant=quant)
    new = tmp_path / "new.safetensors"
    with pytest.raises(CheckpointError, match=f"robuq convert {packed} ") as refusal:
        read_checkpoint(packed)
    assert "\n" not in str(refusal.value)
    assert renew_checkpoint(packed, new).format_version == FORMAT_VERSION
    after = read_checkpoint(new)
    assert after.header.quant == QuantConfig(rank=4)
    assert after.header.provenance == {"seed": 0, "converted_from_format": version}
    assert after.header.tensors == before.header.tensors
    for name, layer in before.layers.items():
        assert torch.equal(after.layers[name].planar, layer.planar)
    with pytest.raises(CheckpointError, match="the present one"):
        renew_checkpoint(new, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_damaged_older_file_is_not_converted(packed: Path, tmp_path: Path) -> None:
    _edit_header(packed, format_version=2)
    content = bytearray(packed.read_bytes())
    content[-1] ^= 1
    packed.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        renew_checkpoint(packed, tmp_path / "new.safetensors")


def test_the_bundled_checkpoint_has_the_present_format() -> None:
    assert read_header(bundled_checkpoint()).quant.weight_planes == 1


def test_ablations_that_the_runtime_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quant\.activation minmax has no packed form"):
        write_tiny(tmp_path / "model.safetensors", quant=QuantConfig(rank=4, activation="minmax"))
    assert not list(tmp_path.iterdir())


def test_dit_xl_shapes_are_the_published_ones() -> None:
    shapes, macs = layer_shapes(preset("DiT-XL/2")), layer_macs(preset("DiT-XL/2"))
    main = {name: out * into for name, (out, into) in shapes.items() if "adaLN" not in name}
    assert sum(main.values()) == 445_906_944
    assert sum(out * into for name, (out, into) in shapes.items() if "adaLN" in name) == 222_953_472
    assert sum(macs[name] for name in main) == pytest.approx(114.15e9, rel=1e-3)


@pytest.mark.parametrize("model", [TINY, preset("DiT-S/8")])
def test_shapes_are_the_networks(model: ModelConfig) -> None:
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in DiT(model).named_parameters()}
    assert dense_shapes(model) == {name: s for name, s in parameters.items() if not name.startswith("blocks.")}
    assert layer_shapes(model) == {
        name.removesuffix(".weight"): shape
        for name, shape in parameters.items()
        if name.startswith("blocks.") and name.endswith(".weight")
    }


def test_dit_xl_at_rank_16_fits_170_megabytes() -> None:
    with torch.device("meta"):
        model = DiT(preset("DiT-XL/2"))
    dense = sum(2 * p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
    size = dense
    for name, (out, into) in layer_shapes(preset("DiT-XL/2")).items():
        rank = 0 if "adaLN" in name else 16
        size += -(-out * into // 5) + 6 * out + -(-into // 8) + 2 * rank * (out + into)
    assert size < 170e6


@pytest.mark.parametrize("keep", [0, 5, 100, 0.3, 0.999])
def test_truncated_files_give_one_clear_error(packed: Path, keep: float) -> None:
    raw = packed.read_bytes()
    packed.write_bytes(raw[: int(keep if keep >= 5 or keep == 0 else keep * len(raw))])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_checkpoint(packed)


def test_every_flipped_byte_of_the_weights_is_noticed(packed: Path) -> None:
    raw = packed.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length
    for position in range(start, len(raw), (len(raw) - start) // 25):
        damaged = bytearray(raw)
        damaged[position] ^= 0x40
        packed.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(packed)


def test_foreign_files_are_named_as_such(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="without a 'robuq' header"):
        read_checkpoint(foreign)
    text = tmp_path / "notes.safetensors"
    text.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_checkpoint(text)
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "is newer"),
        ({"format_version": "one"}, "format_version"),
        ({"colour": "blue"}, "header field colour"),
        ({"quant": {"activation_bits": 11}}, r"quant\.activation_bits"),
        ({"quant": {"activation": "minmax"}}, r"quant\.activation: this runtime has no minmax"),
        ({"quant": {"rank": 4, "weight_planes": 2}}, "but the model needs"),
        ({"model": {"hidden_size": 47}}, "hidden_size"),
        ({"model": TINY.model_copy(update={"depth": 3}).model_dump()}, "tensors do not match the model"),
        ({"model": TINY.model_copy(update={"hidden_size": 96}).model_dump()}, "but the model needs"),
    ],
)
def test_bad_headers_name_the_field(packed: Path, changes: dict[str, Any], message: str) -> None:
    _edit_header(packed, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(packed)


def test_writing_is_whole_or_not_at_all(packed: Path) -> None:
    before = packed.read_bytes()
    model = tiny_model()
    with torch.no_grad():
        model.x_embedder.weight[0, 0] = 1e9
    about = Description(QuantConfig(rank=4), DiffusionConfig(), SamplerConfig())
    with pytest.raises(CheckpointError, match=r"x_embedder\.weight does not fit"):
        write_checkpoint(packed, model, about)
    with pytest.raises(CheckpointError, match="class names"):
        write_checkpoint(packed, model, replace(about, class_names=("one",)))
    with pytest.raises(CheckpointError, match="is not quantised"):
        write_checkpoint(packed, DiT(ModelConfig(**TINY.model_dump())), about)
    assert packed.read_bytes() == before
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]


@pytest.mark.parametrize("activation", ["lloyd_max", "minmax"])
def test_a_rule_that_the_runtime_lacks_is_refused_by_name(tmp_path: Path, activation: ActivationRule) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=f"quant.activation {activation}"):
        write_tiny(path, quant=QuantConfig(rank=0, activation=activation))
    assert not path.exists()
