import math
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import DEEP, join, nested, split, with_header, with_tensor, write_model_of
from safetensors.torch import save_file
from tiny import TINY, tiny_model, write_tiny

from robuq_core.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    Description,
    _expected_tensors,
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
from robuq_core.models.shapes import layer_shapes, parameter_shapes
from robuq_core.safetensors_file import MAX_HEADER_BYTES, MalformedFileError, SafetensorsFile


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    return path


def _edit_header(path: Path, **changes: Any) -> None:
    """Rewrite the project's header, leaving the tensors as they are."""
    path.write_bytes(with_header(path.read_bytes(), lambda inner: inner.update(changes)))


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
        assert len(layer.extra_planes) == quant.weight_planes - 1
        for found, wanted in zip((layer, *layer.extra_planes), (expected, *expected.extra_planes), strict=True):
            for part in ("planar", "alpha", "bias", "signs", "lowrank_a", "lowrank_b"):
                assert torch.equal(getattr(found, part), getattr(wanted, part)), f"{name}.{part}"
        assert (layer.bits, layer.grid) == (expected.bits, expected.grid)
    for name, tensor in checkpoint.dense.items():
        assert torch.equal(tensor, model.get_parameter(name).detach().half().float()), name


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_are_refused_until_they_are_converted(packed: Path, tmp_path: Path, version: int) -> None:
    before = read_checkpoint(packed)
    quant = {"activation_bits": 2, "adaln_bits": 4, "attention_bits": 8, "grid": "midrise", "rank": 4, "seed": 0}
    _edit_header(packed, format_version=version, quant=quant)
    new = tmp_path / "new.safetensors"
    with pytest.raises(CheckpointError, match=f"robuq convert {packed} "):
        read_checkpoint(packed)
    assert renew_checkpoint(packed, new).format_version == FORMAT_VERSION
    after = read_checkpoint(new)
    assert after.header.quant == QuantConfig(rank=4)
    assert after.header.tensors == before.header.tensors
    assert torch.equal(after.layers["blocks.1.mlp.fc1"].planar, before.layers["blocks.1.mlp.fc1"].planar)
    with pytest.raises(CheckpointError, match="not an older one"):
        renew_checkpoint(new, tmp_path / "again.safetensors")
    content = bytearray(packed.read_bytes())
    content[-1] ^= 1
    packed.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{packed.name}: .* is damaged"):
        renew_checkpoint(packed, tmp_path / "again.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {packed.name, new.name}


@pytest.mark.parametrize("model", [TINY, preset("DiT-S/8")])
def test_shapes_are_the_networks(model: ModelConfig) -> None:
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in DiT(model).named_parameters()}
    assert parameter_shapes(model) == parameters
    linears = [n for n, shape in parameters.items() if n.startswith("blocks.") and len(shape) == 2]
    assert [f"{name}.weight" for name in layer_shapes(model)] == linears


def test_dit_xl_packs_below_170_megabytes(packed: Path) -> None:
    header = read_header(packed)
    for quant, megabytes in ((QuantConfig(), 170), (QuantConfig(weight_planes=2), 300)):
        tensors = _expected_tensors(header.model_copy(update={"model": preset("DiT-XL/2"), "quant": quant}))
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
        assert 0.95 * megabytes < size / 1e6 < megabytes


def test_every_flipped_byte_of_the_weights_is_noticed(packed: Path) -> None:
    raw = packed.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length
    for position in range(start, len(raw), (len(raw) - start) // 9):
        damaged = bytearray(raw)
        damaged[position] ^= 0x40
        packed.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(packed)


def test_truncated_and_foreign_files_are_named_as_such(packed: Path, tmp_path: Path) -> None:
    whole, foreign = packed.read_bytes(), tmp_path / "foreign.safetensors"
    for content in (b"", whole[:5], whole[:100], whole[: len(whole) // 3], whole[:-1], b"not a checkpoint"):
        packed.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_checkpoint(packed)
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="without a 'robuq' header"):
        read_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "is newer"),
        ({"format_version": "one"}, "format_version"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": -5}, "format_version is -5"),
        ({"format_version": 10**4000}, "format_version"),
        ({"class_names": [f"class {i}" for i in range(11)]}, "class_names: 11 names for 10 classes"),
        ({"class_names": ["x" * 100_000] * 10}, "class_names"),
        ({"sampler": {"steps": True}}, r"sampler\.steps"),
        ({"sampler": {"guidance_scale": float("nan")}}, r"sampler\.guidance_scale"),
        ({"quant": {"rank": 10**9}}, r"quant\.rank"),
        ({"quant": {"seed": 10**4000}}, r"quant\.seed"),
        ({"colour": "blue"}, "header field colour"),
        ({"quant": {"activation_bits": 11}}, r"quant\.activation_bits"),
        ({"quant": {"activation": "minmax"}}, r"quant\.activation: minmax .* cannot be packed"),
        ({"quant": {"rank": 4, "weight_planes": 2}}, "but the model needs"),
        ({"sampler": {"sampler": "euler"}}, r"sampler\.sampler must be one of"),
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
    with pytest.raises(CheckpointError, match="class_names: 1 names for 10"):
        write_checkpoint(packed, model, replace(about, class_names=("one",)))
    with pytest.raises(CheckpointError, match=r"quant\.activation: minmax"):
        write_checkpoint(packed, model, replace(about, quant=QuantConfig(rank=4, activation="minmax")))
    for beyond in ({"class_names": ("x" * 1001,) * TINY.num_classes}, {"provenance": {"log": "x" * 2**23}}):
        with pytest.raises(CheckpointError):
            write_checkpoint(packed, tiny_model(), replace(about, **beyond))
    with pytest.raises(CheckpointError, match="is not quantised"):
        write_checkpoint(packed, DiT(ModelConfig(**TINY.model_dump())), about)
    assert packed.read_bytes() == before
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]


# What strangers send.


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"depth": 10**8}, "depth"),
        ({"depth": True}, "depth"),
        ({"input_size": 4096}, "input_size"),
        ({"input_size": 2**20}, "input_size"),
        ({"input_size": 4096, "patch_size": 256}, "in_channels"),
        ({"in_channels": 2**20}, "in_channels"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"mlp_ratio": 10**4000}, "mlp_ratio"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"position_scale": float("inf")}, "position_scale"),
        ({"position_scale": float("nan")}, "position_scale"),
        ({"depth": 256, "hidden_size": 32_768, "mlp_ratio": 64}, "tensors do not match the model"),
        ({"hidden_size": 96}, "but the model needs"),
        ({"hidden_size": 47}, "hidden_size"),
        ({"num_classes": 1_000_000}, "class"),
    ],
)
def test_no_number_asks_for_more_than_the_file_holds(packed: Path, changes: dict[str, Any], field: str) -> None:
    write_model_of(packed, packed.read_bytes(), **changes)
    with pytest.raises(CheckpointError, match=field):
        read_checkpoint(packed)


def test_deep_json_is_one_line(packed: Path) -> None:
    raw = packed.read_bytes()
    body = split(raw)[1]
    deep = nested()
    for content in (
        join(deep, body),
        join('{"a":' * DEEP + "}" * DEEP, body),
        with_header(raw, lambda _: deep),
        with_header(raw, lambda _: '{"format_version": 2, "provenance": ' + deep + "}"),
    ):
        packed.write_bytes(content)
        with pytest.raises(CheckpointError, match=packed.name) as refused:
            read_checkpoint(packed)
        assert len(str(refused.value).splitlines()) == 1
        assert len(str(refused.value)) < 1000


def test_headers_that_would_fill_memory_are_not_read(packed: Path) -> None:
    body = split(packed.read_bytes())[1]
    full = (
        join("[" + "[]," * 10**6 + "[]]", body),
        join('{"__metadata__": {"robuq": "' + " " * 32 * 2**20 + '"}}', body),
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + bytes(1000),
    )
    for content in full:
        packed.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=packed.name):
                read_header(packed)
            assert tracemalloc.get_traced_memory()[1] < 3 * MAX_HEADER_BYTES
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},  # bytes of another tensor
        {"dtype": "F16", "shape": [2**40], "data_offsets": [0, 2**41]},
        {"dtype": "F16", "shape": [-4], "data_offsets": [8, 0]},
        {"dtype": "F16", "shape": [1] * 1000, "data_offsets": [0, 2]},
        {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]},
        {"dtype": "F16", "shape": [5], "data_offsets": [0, 8]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": ["F16"], "shape": [1], "data_offsets": [0, 8]},
        "nothing",
    ],
)
def test_places_of_tensors_are_checked(packed: Path, entry: Any) -> None:
    outer, body = split(packed.read_bytes())
    packed.write_bytes(join(outer | {"more": entry}, body))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(packed)


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.alpha", "blocks.0.mlp.fc1.bias", "blocks.1.attn.proj.lowrank_a",
                                  "y_embedder.embedding_table.weight"])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(packed: Path, name: str, value: float) -> None:
    def spoil(tensor: torch.Tensor) -> None:
        tensor.reshape(-1)[-1] = value

    packed.write_bytes(with_tensor(packed.read_bytes(), name, spoil))
    read_header(packed)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(packed)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blocks.0.attn.qkv.signs", torch.int8),
        ("blocks.0.attn.qkv.trits", torch.int8),
        ("blocks.0.attn.qkv.alpha", torch.float32),
        ("blocks.0.attn.qkv.bias", torch.float64),
        ("x_embedder.weight", torch.bfloat16),
    ],
)
def test_a_tensor_of_another_type_is_named(packed: Path, name: str, dtype: torch.dtype) -> None:
    packed.write_bytes(with_tensor(packed.read_bytes(), name, lambda tensor: tensor.to(dtype)))
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(packed)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_signal(packed: Path) -> None:
    size = packed.stat().st_size
    with SafetensorsFile(packed) as file:
        os.truncate(packed, size // 4)
        last = max(file.tensors, key=lambda name: file.tensors[name].start)
        with pytest.raises(MalformedFileError):
            file.read(last)


def test_what_was_checked_is_what_is_used(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is overwritten in place as soon as each tensor has been read."""
    expected = read_checkpoint(packed)
    raw = packed.read_bytes()
    read = SafetensorsFile.read

    def read_and_overwrite(file: SafetensorsFile, name: str) -> torch.Tensor:
        tensor, stored = read(file, name), file.tensors[name]
        with packed.open("r+b") as stream:
            stream.seek(stored.start)
            stream.write(bytes(255 - byte for byte in raw[stored.start : stored.stop]))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", read_and_overwrite)
    found = read_checkpoint(packed)
    assert found.header == expected.header
    assert all(torch.equal(found.dense[name], tensor) for name, tensor in expected.dense.items())
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].planar, layer.planar)
        assert torch.equal(found.layers[name].alpha, layer.alpha)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(packed)
