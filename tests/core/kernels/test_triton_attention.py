"""Attention, the dense linear, whole networks and refused inputs on the Triton backend, in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import REFERENCE, assert_attention_agrees, assert_networks_agree, run_packed
from layer_cases import make_linear, prologues, tokens
from tiny import TINY, write_tiny
from torch import Tensor

pytest.importorskip("triton")

from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import NarrowReferenceBackend
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.quant.choices import Grid

BF16 = torch.bfloat16


def heads_of(images: int, length: int, heads: int, head_dim: int) -> Tensor:
    return tokens(images * length, 3 * heads * head_dim).reshape(images, length, -1)


@pytest.mark.parametrize(
    ("length", "heads", "head_dim"), [(1, 1, 1), (7, 3, 8), (67, 2, 72), (129, 1, 20), (300, 1, 72), (33, 1, 160)]
)
def test_quantised_attention(wide: TritonBackend, length: int, heads: int, head_dim: int) -> None:
    qkv = heads_of(2, length, heads, head_dim)
    for size in (0.3, 4.0):  # diffuse, and sharp
        assert_attention_agrees(size * qkv, heads, wide.attention(size * qkv, heads, True))


def test_diffuse_heads_of_many_tokens(wide: TritonBackend) -> None:
    """Values of one sign, for large sums."""
    qkv = torch.randn(1, 1024, 3, 16, generator=torch.Generator().manual_seed(1))
    qkv[:, :, 0] *= 0.3
    qkv[:, :, 2] = qkv[:, :, 2].abs()
    assert_attention_agrees(qkv.flatten(2), 1, wide.attention(qkv.flatten(2), 1, True))


@pytest.mark.parametrize(("length", "heads", "head_dim"), [(7, 3, 8), (67, 2, 72)])
@pytest.mark.parametrize("quantized", [True, False])
def test_attention_in_bfloat16_is_the_float32_one_rounded_once(
    narrow: TritonBackend, length: int, heads: int, head_dim: int, quantized: bool
) -> None:
    qkv = heads_of(2, length, heads, head_dim).to(BF16)
    found = narrow.attention(qkv, heads, quantized)
    assert found.dtype is BF16
    assert torch.equal(found, narrow.attention(qkv.float(), heads, quantized).to(BF16))
    if not quantized:
        torch.testing.assert_close(found.float(), REFERENCE.attention(qkv.float(), heads, False), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_image_attends_as_if_alone(wide: TritonBackend, quantized: bool) -> None:
    qkv = heads_of(3, 35, 2, 36)
    together = wide.attention(qkv, 2, quantized)
    for i in range(3):
        assert torch.equal(wide.attention(qkv[i : i + 1], 2, quantized)[0], together[i])


def test_attention_of_zeros_and_of_nothing(wide: TritonBackend) -> None:
    assert not wide.attention(torch.zeros(1, 9, 36), 2, True).any()
    assert wide.attention(torch.zeros(0, 9, 36), 2, True).shape == (0, 9, 12)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (29, 77, 131), (50, 256, 64)])
def test_linear(wide: TritonBackend, rows: int, width: int, outputs: int) -> None:
    x, weight, bias = tokens(rows, width), tokens(outputs, width, seed=1), tokens(1, outputs, seed=2)[0]
    exact = REFERENCE.linear(x.double(), weight.double(), bias.double())
    own = float((REFERENCE.linear(x, weight, bias) - exact).abs().max())
    y = wide.linear(x, weight, bias)
    assert float((y - exact).abs().max()) <= 2 * own + float(exact.abs().max()) * 2**-22
    assert torch.equal(wide.linear(x[-1:], weight, bias), y[-1:])


def test_views_are_taken(wide: TritonBackend) -> None:
    layer, view = pack_layer(make_linear(36, 8, bits=2)), tokens(4, 72)[:, ::2]
    assert torch.equal(wide.rotate_quantize(view, layer).codes, wide.rotate_quantize(view.clone(), layer).codes)


REFUSED = [
    (r"x must .*\(4, 36\)", lambda ops, layer, x: ops.rotate_quantize(tokens(4, 72), layer)),
    ("x must", lambda ops, layer, x: ops.rotate_quantize(x.half(), layer)),
    ("'relu'", lambda ops, layer, x: ops.rotate_quantize(x, layer, "relu")),
    (r"3 rows .* 2 images", lambda ops, layer, x: ops.rotate_quantize(x, layer, prologues(2, 36)[3])),
    ("5 heads", lambda ops, layer, x: ops.attention(torch.zeros(1, 2, 36), 5, True)),
    ("head_dim", lambda ops, layer, x: ops.attention(torch.zeros(1, 2, 3 * 257), 1, True)),
    ("torch.float16", lambda ops, layer, x: TritonBackend(activations=torch.float16)),
    ("torch.float16", lambda ops, layer, x: ops.ternary_linear(ops.rotate_quantize(x, layer), layer, torch.float16)),
    ("scales must", lambda ops, layer, x: ops.ternary_linear(replace(ops.rotate_quantize(x, layer), scales=x), layer)),
    (r"144.*36", lambda ops, layer, x: ops.rotate_quantize(
        tokens(1, 144), pack_layer(make_linear(144, 5, bits=3, rotation_block=36)))),
]  # fmt: skip


@pytest.mark.parametrize(("named", "call"), REFUSED)
def test_what_kernels_do_not_take_is_named(named: str, call: Callable[..., Any], wide: TritonBackend) -> None:
    with pytest.raises(ValueError, match=named):
        call(wide, pack_layer(make_linear(36, 8, bits=2)), tokens(3, 36))


@pytest.mark.parametrize(("bits", "grid"), [(2, "midrise"), (3, "midtread")])
def test_a_whole_network(tmp_path: Path, wide: TritonBackend, narrow: TritonBackend, bits: int, grid: Grid) -> None:
    """It is the reference's in both dtypes of activations, and a row alone is itself among others, to the bit."""
    path = tmp_path / "model.safetensors"
    write_tiny(path, quant=QuantConfig(activation_bits=bits, grid=grid, rank=4))
    checkpoint = read_checkpoint(path)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(bits))
    timesteps, classes = torch.tensor([0, 250, 999]), torch.tensor([0, 10, 4])
    for backend, reference in ((wide, REFERENCE), (narrow, NarrowReferenceBackend())):
        result = run_packed(TINY, checkpoint, backend, x, timesteps, classes)
        expected = run_packed(TINY, checkpoint, reference, x, timesteps, classes)
        assert result.output.dtype is torch.float32
        assert_networks_agree(result, expected, bits, narrow=backend is narrow)
        alone = run_packed(TINY, checkpoint, backend, x[1:2], timesteps[1:2], classes[1:2])
        assert torch.equal(alone.output[0], result.output[1])
