"""The operators pass torch's own checks, and a traced network is the eager one."""

from __future__ import annotations

import pytest
import torch
from agreement import UNMOVED_ERROR, relative_errors
from layer_cases import make_linear, tokens
from tiny import write_tiny

from robuq_core.kernels import library
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.library import TraceableBackend
from robuq_core.kernels.ops import Modulation, Prologue
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import NarrowReferenceBackend
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.pipeline import Sampler

BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> PackedDiT:
    path = tmp_path_factory.mktemp("library") / "tiny.safetensors"
    write_tiny(path)
    model = Sampler.from_checkpoint(path, threads=1).model
    assert isinstance(model, PackedDiT)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_operators_pass_opcheck(backend: str, rank: int) -> None:
    # The key is the wrapper's own business; the checks need the bare operators.
    wrapper = TraceableBackend(select_backend(backend, 1))
    key = wrapper._key
    layer = pack_layer(make_linear(48, 20, bits=2, rank=rank))
    parts = [layer.planar, layer.alpha, layer.bias, layer.signs, layer.lowrank_a, layer.lowrank_b]
    x, image = tokens(6, 48), tokens(2, 48, seed=1)
    for prologue, modulation in (("", []), ("gelu", []), ("silu", []), ("modulation", [image, image + 1])):
        for block in (0, 16):
            arguments = (x, parts, 2, "midrise", block, prologue, modulation, 1e-6, key)
            torch.library.opcheck(library.rotate_quantize, arguments)
    quantized = wrapper.rotate_quantize(x, layer)
    codes = [quantized.codes, quantized.scales, quantized.lowrank]
    torch.library.opcheck(library.ternary_linear, (codes, parts, 2, "midrise", torch.float32, False, key))
    torch.library.opcheck(library.attention, (torch.randn(2, 5, 36), 3, True, key))
    torch.library.opcheck(library.linear, (x, torch.randn(7, 48), torch.randn(7), key))


def test_operators_of_activations_in_bfloat16_pass_opcheck() -> None:
    wrapper = TraceableBackend(NarrowReferenceBackend())
    layer, x = pack_layer(make_linear(48, 20, bits=2, rank=3)), tokens(6, 48).bfloat16()
    parts = [layer.planar, layer.alpha, layer.bias, layer.signs, layer.lowrank_a, layer.lowrank_b]
    torch.library.opcheck(library.rotate_quantize, (x, parts, 2, "midrise", 0, "gelu", [], 0.0, wrapper._key))
    quantized = wrapper.rotate_quantize(x, layer)
    codes = [quantized.codes, quantized.scales, quantized.lowrank]
    torch.library.opcheck(library.ternary_linear, (codes, parts, 2, "midrise", torch.bfloat16, True, wrapper._key))
    torch.library.opcheck(library.attention, (torch.randn(2, 5, 36).bfloat16(), 3, True, wrapper._key))


@pytest.mark.parametrize("prologue", [None, "gelu", "silu", "modulation"])
@pytest.mark.parametrize("block", [None, 4])
def test_wrapped_ops_are_the_backends_own(prologue: str | None, block: int | None) -> None:
    backend = select_backend("cpu", 1)
    wrapped = TraceableBackend(backend)
    assert (wrapped.name, wrapped.device) == (backend.name, backend.device)
    layer, x = pack_layer(make_linear(36, 12, bits=3, grid="midtread", rank=2, rotation_block=block)), tokens(4, 36)
    chosen: Prologue = Modulation(x[:2], x[2:], 1e-5) if prologue == "modulation" else prologue  # type: ignore[assignment]
    mine, theirs = wrapped.rotate_quantize(x, layer, chosen), backend.rotate_quantize(x, layer, chosen)
    for part in ("codes", "scales", "lowrank"):
        assert torch.equal(getattr(mine, part), getattr(theirs, part))
    assert torch.equal(wrapped.ternary_linear(mine, layer), backend.ternary_linear(theirs, layer))
    with pytest.raises(ValueError, match="prologue must be"):
        wrapped.rotate_quantize(x, layer, "relu")  # type: ignore[arg-type]


def compiled_against_eager(network: PackedDiT, compiler: str) -> tuple[torch.Tensor, torch.Tensor]:
    traced = network.replica(TraceableBackend(network.backend))
    compiled = torch.compile(traced.denoise, fullgraph=True, backend=compiler)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    slots = network.conditioning.slots([1, 500, 1] * 2, [1, 2, 1] * 2)
    with torch.inference_mode():
        expected = network.denoise(x.clone(), slots, network.conditioning.table)
        return compiled(x, slots, network.conditioning.table), expected


@pytest.mark.parametrize("narrow", [False, True])
def test_a_traced_network_is_the_eager_one(network: PackedDiT, narrow: bool) -> None:
    chosen = network.replica(NarrowReferenceBackend()) if narrow else network
    result, expected = compiled_against_eager(chosen, "aot_eager")
    assert result.dtype is torch.float32
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_a_compiled_network_is_the_eager_one_to_rounding(network: PackedDiT) -> None:
    result, expected = compiled_against_eager(network, "inductor")
    # A code next to the edge of its cell may move, and its image with it.
    assert int((relative_errors(result, expected) > UNMOVED_ERROR).sum()) <= 3
