"""A layer of several planes is one layer: on every backend the packed form is the fake-quantised one."""

import pytest
import torch
import torch.nn.functional as F
from agreement import BF16_ROUNDING, multiplies_bf16
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import make_linear, tokens

from robuq_core.kernels.cpu import CpuBackend
from robuq_core.kernels.ops import Backend, Modulation, fused_linear
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.quant.ternary import ternary_fake_quantize

BACKENDS: dict[str, Backend] = {"reference": ReferenceBackend(), "cpu": CpuBackend(1)}


@pytest.mark.parametrize("name", BACKENDS)
@given(
    planes=st.integers(1, 3),
    bits=st.integers(1, 8),
    grid=st.sampled_from(["midrise", "midtread"]),
    width=st.sampled_from([12, 36, 96, 256]),
    outputs=st.integers(1, 40),
    rows=st.integers(1, 9),
    rank=st.integers(0, 4),
    prologue=st.sampled_from([None, "gelu", "silu", "modulation"]),
)
def test_planes_sum_to_the_training_forward(
    name: str, planes: int, bits: int, grid: str, width: int, outputs: int, rows: int, rank: int, prologue: str | None
) -> None:
    rank = min(rank, outputs - 1)
    linear = make_linear(width, outputs, bits=bits, grid=grid, rank=rank, planes=planes)
    layer, x = pack_layer(linear), tokens(rows, width, seed=bits)
    before = Modulation(torch.randn(1, width), torch.randn(1, width), 1e-6) if prologue == "modulation" else prologue
    assert len(layer.extra_planes) == planes - 1
    backend = BACKENDS[name]
    # From the backend's own codes: a value on the edge of its cell may fall to either side of it.
    quantized = backend.rotate_quantize(x, layer, before)
    with torch.no_grad():
        expected = F.linear(
            quantized.codes.float() * quantized.scales[:, None],
            ternary_fake_quantize(linear.weight, planes=planes),
            linear.bias,
        )
        rotated = linear.rotation(apply_prologue(x, before))
        expected += F.linear(F.linear(rotated, layer.lowrank_b.float()), layer.lowrank_a.float())
        if name == "reference":
            torch.testing.assert_close(linear(apply_prologue(x, before)), expected, rtol=1e-4, atol=1e-4)
    allowed = 1e-4 * (1 + expected.abs())
    if multiplies_bf16(backend):  # twice: rotated values, then projected ones
        size = rotated.abs() @ layer.lowrank_b.float().abs().T @ layer.lowrank_a.float().abs().T
        allowed += 2.01 * BF16_ROUNDING * size
    assert ((fused_linear(backend)(x, layer, before) - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_several_planes_do_not_depend_on_their_neighbours(name: str) -> None:
    layer, x = pack_layer(make_linear(96, 33, bits=4, rank=3, planes=3)), tokens(11, 96)
    run = fused_linear(BACKENDS[name])
    together = run(x, layer)
    if name == "reference":
        torch.testing.assert_close(together[4:5], run(x[4:5], layer))
    else:
        assert torch.equal(together[4:5], run(x[4:5], layer))


def test_memory_is_that_of_the_planes() -> None:
    one, three = (pack_layer(make_linear(256, 40, bits=4, rank=2, planes=planes)) for planes in (1, 3))
    # Codes, scales, and a bias of zeros and the signs, which the planes share but count for themselves.
    assert three.nbytes - one.nbytes == 2 * (one.planar.nbytes + 40 * 4 + 40 * 4 + 256 * 4)
    moved = three.to(torch.device("meta"))
    assert [plane.planar.device.type for plane in (moved, *moved.extra_planes)] == ["meta"] * 3
