"""Cases of every level on a tiny checkpoint: ours is checked against the reference, a broken kernel gets no timing."""

from __future__ import annotations

import pytest
import torch
from tiny import write_tiny
from torch import Tensor

from robuq_core.bench.cases import Bench, block_case, forward_case, image_case, op_case
from robuq_core.bench.report import CaseTiming
from robuq_core.bench.source import Source, open_source, random_checkpoint
from robuq_core.bench.timing import BenchError, Timer
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.errors import UserError
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.presets import PRESETS
from robuq_core.models.shapes import dense_shapes, layer_macs, layer_shapes

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(ReferenceBackend):
    """A backend with one fault."""

    name = "broken"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        q = super().rotate_quantize(x, layer, prologue)
        return Quantized(-q.codes, q.scales, q.lowrank) if self.fault == "codes" else q

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        y = super().ternary_linear(x, layer)
        return {"scale": y * 1.5, "rows": y.flip(0), "nan": y * torch.nan}.get(self.fault, y)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("bench") / "tiny.safetensors"
    write_tiny(path, quant=QuantConfig(rank=4, activation_bits=4))  # with 2 bits so small a network magnifies a flip
    return open_source(None, path)


def make_bench(source: Source, backend: Backend | None = None, peers: tuple[str, ...] = ("fp32",)) -> Bench:
    return Bench(source, backend or select_backend("auto", 1), Timer(rounds=3, budget_s=0.0), peers)


def names(case: CaseTiming) -> set[str]:
    return {side.name for side in case.sides}


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"])
def test_layers_are_timed_whole_and_in_halves(source: Source, layer: str) -> None:
    case = op_case(make_bench(source, peers=("fp32", "bf16", "int8-gemlite")), layer, batch=2)
    assert {"fp32", "robuq", "robuq prologue", "robuq product"} <= names(case)
    assert case.level == "op"
    assert case.macs == 2 * layer_macs(source.config)[f"blocks.0.{layer}"]
    assert "int8-gemlite" in {absent.name for absent in case.absent}
    assert all(side.relative_error <= side.tolerance for side in case.sides)


@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_forwards_and_images_are_timed(source: Source, batch: int) -> None:
    block, forward, image = (make(make_bench(source), batch) for make in (block_case, forward_case, image_case))
    for case in (block, forward, image):
        assert names(case) == {"fp32", "robuq"}
        assert case.batch == batch
        assert all(side.speedup is not None and side.speedup > 0 for side in case.sides)
    assert image.case == "4 steps of ddim, guidance 1.5"
    assert image.macs == 2 * 4 * forward.macs
    exact = forward_case(make_bench(source, Broken("none")), batch)
    assert next(side.relative_error for side in exact.sides if side.name == "robuq") == 0


def test_a_forward_is_not_timed_out_of_what_the_one_before_kept(source: Source) -> None:
    class Counting(ReferenceBackend):
        adaln = 0

        def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
            self.adaln += layer.out_features == 6 * layer.in_features
            return super().ternary_linear(x, layer)

    backend = Counting()
    case = forward_case(make_bench(source, backend), batch=1)
    assert backend.adaln >= 3 * source.config.depth
    assert case.sides[0].rounds == 3


@pytest.mark.parametrize("fault", ["scale", "rows", "nan", "codes"])
def test_a_wrong_result_gives_no_timing(source: Source, fault: str) -> None:
    bench = make_bench(source, Broken(fault))
    with pytest.raises(BenchError, match=r"robuq.* is off by .* No timing is reported"):
        op_case(bench, "attn.qkv", batch=2)
    for level in (block_case, forward_case, image_case):
        with pytest.raises(BenchError, match="robuq is off by"):
            level(bench, batch=2)


def test_random_weights_have_the_shapes_of_a_checkpoint() -> None:
    model = ModelConfig(input_size=8, patch_size=4, hidden_size=24, depth=2, num_heads=2, num_classes=3)
    drawn = random_checkpoint(model, QuantConfig(rank=3, bits={"blocks.1.mlp.fc1": 3}))
    assert {n: (layer.out_features, layer.in_features) for n, layer in drawn.layers.items()} == layer_shapes(model)
    assert {name: tuple(tensor.shape) for name, tensor in drawn.dense.items()} == dense_shapes(model)
    assert {layer.rank for name, layer in drawn.layers.items() if "adaLN" not in name} == {3}
    assert (drawn.layers["blocks.1.mlp.fc1"].bits, drawn.layers["blocks.0.mlp.fc1"].bits) == (3, 2)
    first, second = drawn.layers["blocks.0.attn.qkv"].planar, drawn.layers["blocks.1.attn.qkv"].planar
    assert first.data_ptr() != second.data_ptr()
    again = random_checkpoint(model, QuantConfig(rank=3))
    assert all(torch.equal(value, again.dense[name]) for name, value in drawn.dense.items())


def test_a_source_is_a_preset_or_a_file(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    monkeypatch.setitem(PRESETS, "DiT-Tiny/4", source.config)
    assert open_source("DiT-Tiny/4", None).path is None
    assert open_source(None, source.path).name == "tiny"
    with pytest.raises(UserError, match="--preset and --checkpoint exclude each other"):
        open_source("DiT-Tiny/4", source.path)
    with pytest.raises(ValueError, match="unknown preset 'DiT-0'"):
        open_source("DiT-0", None)
