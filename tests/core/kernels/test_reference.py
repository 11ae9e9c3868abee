"""The packed layer on the reference backend is the fake-quantised layer: same codes, same output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_attention_agrees, assert_products_agree
from layer_cases import WIDTHS, make_linear, tokens

from robuq_core.kernels.ops import Modulation
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.quant.activation import quantize_activation
from robuq_core.quant.attention import quantized_attention
from robuq_core.quant.choices import Grid
from robuq_core.quant.packing import unpack_planar
from robuq_core.quant.ternary import ternarize

BACKEND = ReferenceBackend()


@pytest.mark.parametrize("grid", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_layer_is_the_fake_quantised_layer(width: int, bits: int, grid: Grid) -> None:
    for rows, rank in ((1, 0), (3, 2), (17, 3)):
        linear = make_linear(width, 33, bits=bits, grid=grid, rank=rank)
        layer, x = pack_layer(linear), tokens(rows, width)
        quantized = BACKEND.rotate_quantize(x, layer)
        codes, scales = quantize_activation(linear.rotation(x), bits, grid)
        assert torch.equal(quantized.codes, codes)
        assert torch.equal(quantized.scales, scales.squeeze(1))
        with torch.no_grad():
            assert_products_agree(BACKEND.ternary_linear(quantized, layer), quantized, layer)
            assert_products_agree(linear(x), quantized, layer, additions=width)


def test_pack_layer_keeps_the_numbers_that_a_file_keeps() -> None:
    linear = make_linear(72, 33, bits=3, rank=4)
    layer = pack_layer(linear)
    codes, alpha = ternarize(linear.weight.detach())
    assert torch.equal(unpack_planar(layer.planar, 72), codes)
    assert torch.equal(layer.alpha, alpha)
    assert torch.equal(layer.alpha.half().float(), layer.alpha)
    for factor in (layer.lowrank_a, layer.lowrank_b):
        assert factor.dtype is torch.bfloat16
        assert factor.is_contiguous()
        assert not factor.requires_grad
    assert (layer.in_features, layer.out_features, layer.rank, layer.bits, layer.grid) == (72, 33, 4, 3, "midrise")


def test_prologues_are_torchs_own() -> None:
    x, shift, scale = tokens(6, 36), torch.randn(2, 36), torch.randn(2, 36)
    modulated = F.layer_norm(x.reshape(2, 3, 36), (36,), eps=1e-5) * (1 + scale[:, None]) + shift[:, None]
    assert torch.equal(apply_prologue(x, Modulation(shift, scale, 1e-5)), modulated.reshape(6, 36))
    assert torch.equal(apply_prologue(x, "gelu"), F.gelu(x, approximate="tanh"))
    assert torch.equal(apply_prologue(x, "silu"), F.silu(x))
    assert apply_prologue(x, None) is x


def test_bad_prologues_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows do not divide among 2 images"):
        apply_prologue(tokens(5, 12), Modulation(torch.zeros(2, 12), torch.zeros(2, 12), 1e-6))
    with pytest.raises(ValueError, match="'relu'"):
        apply_prologue(tokens(5, 12), "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1152, 1536])
def test_a_layer_trained_in_bf16_is_its_packed_layer(width: int) -> None:
    """The codes are equal and the gain is one: bf16 rounds products, but neither the rotation nor the quantiser."""
    linear = make_linear(width, 64, bits=2, rank=4)
    x = tokens(96, width).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = linear(x).double()
    layer = pack_layer(linear)
    packed = BACKEND.ternary_linear(BACKEND.rotate_quantize(x.float(), layer), layer).double()
    assert float((trained - packed).norm() / packed.norm()) < 6e-3
    assert float((trained * packed).sum() / packed.square().sum()) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_splits_heads_as_the_model_does(quantized: bool) -> None:
    qkv = tokens(2 * 9, 3 * 24).reshape(2, 9, 72)
    q, k, v = (part.reshape(2, 9, 3, 8).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    attend = quantized_attention if quantized else F.scaled_dot_product_attention
    expected = attend(q, k, v).transpose(1, 2).reshape(2, 9, 24)
    torch.testing.assert_close(BACKEND.attention(qkv, 3, quantized), expected)


@pytest.mark.parametrize("length", [64, 777])
def test_eight_bit_attention_is_the_formula_in_float64(length: int) -> None:
    qkv = tokens(length, 3 * 72)[None]
    assert_attention_agrees(qkv, 2, BACKEND.attention(qkv, 2, True))


def test_a_token_of_zeros_gives_the_bias() -> None:
    layer = pack_layer(make_linear(12, 5, bits=2, rank=1))
    quantized = BACKEND.rotate_quantize(torch.zeros(1, 12), layer)
    assert torch.equal(BACKEND.ternary_linear(quantized, layer)[0], layer.bias)
