"""What ``robuq inspect`` reports adds up."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model, write_tiny

from robuq_core.checkpoint import CheckpointError, layer_macs, layer_shapes
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.inspection import fp32_bytes, inspect_checkpoint
from robuq_core.models.dit import DiT
from robuq_core.pipeline import bundled_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelConfig(input_size=8, patch_size=4, in_channels=3, hidden_size=24, depth=1, num_heads=2, num_classes=3)


@settings(max_examples=12)
@given(
    rank=st.integers(0, 5),
    adaln_rank=st.integers(0, 3),
    depth=st.integers(1, 3),
    hidden=st.sampled_from([24, 32, 40]),
    learn_sigma=st.booleans(),
)
def test_the_parts_sum_to_the_file(
    tmp_path_factory: pytest.TempPathFactory, rank: int, adaln_rank: int, depth: int, hidden: int, learn_sigma: bool
) -> None:
    path = tmp_path_factory.mktemp("parts") / "packed.safetensors"
    changes = {"depth": depth, "hidden_size": hidden, "learn_sigma": learn_sigma}
    write_tiny(path, SMALL.model_copy(update=changes), QuantConfig(rank=rank, adaln_rank=adaln_rank))
    report = inspect_checkpoint(path)
    parts = report.bytes_by_part
    assert sum(parts.values()) == report.file_bytes == path.stat().st_size
    assert all(size > 0 for size in parts.values())
    assert ("low-rank branch" in parts) == (rank + adaln_rank > 0)
    weights = [out * into for out, into in layer_shapes(report.header.model).values()]
    assert parts["ternary weights (base 3)"] == sum(-(-count // 5) for count in weights)


def test_every_part_has_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    write_tiny(path, SMALL, QuantConfig(rank=2, adaln_rank=1))
    parts = inspect_checkpoint(path).bytes_by_part
    shapes = layer_shapes(SMALL).values()
    outputs, inputs = [out for out, _ in shapes], [into for _, into in shapes]
    assert parts["weight scales"] == 2 * sum(outputs)
    assert parts["biases"] == 4 * sum(outputs)
    assert parts["rotation signs"] == sum(-(-into // 8) for into in inputs)
    ranks = [2, 2, 2, 2, 1]
    assert parts["low-rank branch"] == 2 * sum(r * (o + i) for r, o, i in zip(ranks, outputs, inputs, strict=True))
    dense = sum(p.numel() for name, p in DiT(SMALL).named_parameters() if not name.startswith("blocks."))
    assert parts["embedders and final layer"] == 2 * dense


def test_compression_is_against_the_network_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    write_tiny(path)
    report = inspect_checkpoint(path)
    assert report.fp32_bytes == sum(4 * p.numel() for p in DiT(TINY).parameters())
    assert report.compression == report.fp32_bytes / report.file_bytes
    assert report.compression > 1


def test_the_published_size_counts_its_parameters(tmp_path: Path) -> None:
    """DiT-XL/2 has 675 M parameters (arXiv 2212.09748, table 4)."""
    path = tmp_path / "packed.safetensors"
    write_tiny(path)
    header = inspect_checkpoint(path).header
    assert fp32_bytes(header.model_copy(update={"model": ModelConfig()})) / 4e6 == pytest.approx(675, abs=1)


@settings(max_examples=12)
@given(data=st.data())
def test_average_bits_weigh_layers_by_their_macs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    model = TINY.model_copy(update={"depth": 1, "hidden_size": 24})
    names = list(layer_shapes(model))
    bits = data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, 8)))
    path = tmp_path_factory.mktemp("bits") / "packed.safetensors"
    write_tiny(path, model, QuantConfig(rank=0, activation_bits=2, adaln_bits=4, bits=bits))
    header = inspect_checkpoint(path).header
    adaln = "blocks.0.adaLN_modulation.1"
    assert header.bits == {name: bits.get(name, 4 if name == adaln else 2) for name in names}
    macs = {name: size for name, size in layer_macs(model).items() if name != adaln}
    expected = sum(macs[name] * bits.get(name, 2) for name in macs) / sum(macs.values())
    assert header.average_activation_bits == pytest.approx(expected)


def test_macs_count_every_token_but_adaln_once() -> None:
    macs = layer_macs(TINY)
    assert macs["blocks.1.attn.qkv"] == 16 * 48 * 144
    assert macs["blocks.1.mlp.fc2"] == 16 * 192 * 48
    assert macs["blocks.0.adaLN_modulation.1"] == 48 * 288


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    write_tiny(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"packed\.safetensors: not a whole safetensors file"):
        inspect_checkpoint(path)


def test_the_model_of_these_tests_has_no_dead_layer() -> None:
    assert all(bool(parameter.abs().sum() > 0) for parameter in tiny_model().parameters() if parameter.numel())


def test_the_bundled_checkpoint_is_what_its_card_says() -> None:
    report = inspect_checkpoint(bundled_checkpoint())
    header = report.header
    assert report.file_bytes <= 10e6
    assert header.average_activation_bits <= 2
    assert header.model.num_classes == len(header.class_names) == 1000
    assert header.class_names[207] == "golden retriever"
    assert header.model.input_size >= 32
    for stage in ("teacher", "qat"):
        history = header.provenance[stage]["history"]
        assert history
        assert all({"commit", "command", "seed", "data", "config"} <= set(start) for start in history)
