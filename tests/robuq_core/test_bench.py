"""The benchmark reports a timing only of a result that is right."""

import json
from pathlib import Path

import pytest
import torch
from tiny import TINY, write_tiny
from torch import Tensor

from robuq_core import bench
from robuq_core.bench import BenchError, as_json, bench_forward, random_weights
from robuq_core.checkpoint import layer_shapes
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.kernels.ops import Backend, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.kernels.select import select_backend
from robuq_core.models.presets import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")


class Broken(ReferenceBackend):
    """A backend with one fault in its ternary product."""

    name = "broken"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        y = super().ternary_linear(x, layer)
        if self.fault == "scale":
            return y * 1.5
        if self.fault == "rows":
            return y.flip(0)
        if self.fault == "nan":
            return y * torch.nan
        return y


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.safetensors"
    write_tiny(path)
    return path


def choose(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def select(name: str, threads: int | None = None) -> Backend:
        return Broken(fault) if name == "broken" else select_backend(name, threads)

    monkeypatch.setattr(bench, "select_backend", select)


@pytest.mark.parametrize("fault", ["scale", "rows", "nan"])
def test_a_wrong_result_gives_no_timing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    choose(monkeypatch, fault)
    with pytest.raises(BenchError, match=r"tiny at batch 2: broken is off by .* No timing is reported"):
        bench_forward("tiny", [2], checkpoint=checkpoint, backend="broken", threads=None, repeats=3)


def test_a_right_result_of_the_same_backend_is_timed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "none")
    (timing,) = bench_forward("tiny", [2], checkpoint=checkpoint, backend="broken", threads=None, repeats=3)
    assert timing.backend == "broken"
    assert timing.relative_error == 0


def test_figures_are_of_the_asked_batches_and_add_up(checkpoint: Path) -> None:
    timings = bench_forward("tiny", [1, 4], checkpoint=checkpoint, backend="reference", threads=1, repeats=3)
    assert [timing.batch for timing in timings] == [1, 4]
    for timing in timings:
        assert timing.model == "tiny"
        assert timing.packed_s > 0
        assert timing.fp32_s > 0
        assert timing.packed_spread_s >= 0
        assert timing.ratio == pytest.approx(timing.fp32_s / timing.packed_s)
    tree = json.loads(json.dumps(as_json(timings)))
    assert [timing["batch"] for timing in tree["forward"]] == [1, 4]
    assert tree["machine"]["threads"] == 1


def test_a_preset_is_timed_with_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "DiT-Small/4", TINY)
    (timing,) = bench_forward("DiT-Small/4", [1], checkpoint=None, backend="auto", threads=None, repeats=3)
    assert timing.relative_error < bench.MAX_RELATIVE_ERROR


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preset 'DiT-0'"):
        bench_forward("DiT-0", [1], checkpoint=None, backend="reference", threads=None, repeats=3)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        bench_forward("DiT-S/8", [1], checkpoint=None, backend="fast", threads=None, repeats=3)


def test_random_weights_have_the_shapes_of_a_checkpoint() -> None:
    model = ModelConfig(input_size=8, patch_size=4, hidden_size=24, depth=2, num_heads=2, num_classes=3)
    dense, layers = random_weights(model, QuantConfig(rank=3, adaln_rank=0))
    assert {name: (layer.out_features, layer.in_features) for name, layer in layers.items()} == layer_shapes(model)
    assert {layer.rank for name, layer in layers.items() if "adaLN" not in name} == {3}
    assert dense["y_embedder.embedding_table.weight"].shape == (4, 24)
    again = random_weights(model, QuantConfig(rank=3))[0]
    assert all(torch.equal(value, again[name]) for name, value in dense.items())
