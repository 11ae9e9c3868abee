"""What ``robuq inspect`` reports adds up."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, write_tiny

from robuq_core.checkpoint import Header, read_header
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.inspection import Amount, equivalent_macs, inspect_checkpoint, ratio, theoretical_bytes
from robuq_core.models.shapes import layer_macs, layer_shapes
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


def test_average_bits_weigh_layers_by_their_macs(tmp_path: Path) -> None:
    bits = {"blocks.0.attn.qkv": 3, "blocks.1.mlp.fc2": 1, "blocks.1.adaLN_modulation.1": 8}
    write_tiny(tmp_path / "packed.safetensors", quant=QuantConfig(rank=0, activation_bits=2, adaln_bits=4, bits=bits))
    header = read_header(tmp_path / "packed.safetensors")
    names = layer_shapes(TINY)
    assert header.bits == {name: bits.get(name, 4 if "adaLN" in name else 2) for name in names}
    macs = {name: size for name, size in layer_macs(TINY).items() if "adaLN" not in name}
    expected = sum(macs[name] * bits.get(name, 2) for name in macs) / sum(macs.values())
    assert header.average_activation_bits == pytest.approx(expected)


def _dit_xl(tmp_path: Path, **quant: int) -> Header:
    write_tiny(tmp_path / "packed.safetensors")
    header = read_header(tmp_path / "packed.safetensors")
    return header.model_copy(update={"model": ModelConfig(), "quant": QuantConfig(rank=16, **quant)})


def test_the_papers_size_comes_out_with_a_branch_on_adaln(tmp_path: Path) -> None:
    """13.2 times less, 204.7 MB, of DiT-XL/2 with rank 16 everywhere."""
    parts = theoretical_bytes(_dit_xl(tmp_path, adaln_rank=16))
    assert sum(part.full for part in parts.values()) == 4 * 675_129_632
    assert sum(part.quantised for part in parts.values()) / 1e6 == pytest.approx(204.7, abs=0.1)
    assert ratio(parts) == pytest.approx(13.2, abs=0.05)
    assert ratio(theoretical_bytes(_dit_xl(tmp_path))) == pytest.approx(14.2, abs=0.1)


@pytest.mark.parametrize(("bits", "gflops"), [(2, 6.77), (3, 8.56), (4, 10.34)])
def test_the_papers_compute_comes_out_within_two_percent(tmp_path: Path, bits: int, gflops: float) -> None:
    """6.4, 8.4 and 10.5 in its figure; 17.3 times less at 2 bits."""
    parts = equivalent_macs(_dit_xl(tmp_path, adaln_rank=16, activation_bits=bits))
    assert sum(part.full for part in parts.values()) / 1e9 == pytest.approx(118.64, abs=0.02)
    assert sum(part.quantised for part in parts.values()) / 1e9 == pytest.approx(gflops, abs=0.01)
    assert parts["low-rank branch"].quantised / 1e9 == pytest.approx(2.118, abs=0.001)
    if bits == 2:
        assert ratio(parts) == pytest.approx(17.3, rel=0.02)


def test_parts_of_the_theory_are_the_networks_own(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    write_tiny(path, quant=QuantConfig(rank=0, activation_bits=4, weight_planes=2, attention_bits=None))
    report = inspect_checkpoint(path)
    macs = sum(size for name, size in layer_macs(TINY).items() if "adaLN" not in name)
    assert report.compute["linears of the blocks"] == Amount(macs, macs * 4 * 2 / 64)
    assert report.compute["attention"].quantised == report.compute["attention"].full == 2 * 2 * 16**2 * 48
    assert report.compute["low-rank branch"].quantised == 0
    assert sum(part.full for part in report.theoretical_bytes.values()) == report.fp32_bytes + 4 * 16 * 48


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
