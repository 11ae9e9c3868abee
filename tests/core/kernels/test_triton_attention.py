"""Attention, the dense linear and whole networks on the Triton backend, compiled for sm_80 and sm_90 and executed in
the emulator of ``tests/ptx``. Any race or stray access fails a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from agreement import REFERENCE, assert_attention_agrees, assert_networks_agree, relative_errors, run_packed
from layer_cases import make_linear, tokens
from tiny import TINY, write_tiny
from torch import Tensor

pytest.importorskip("triton")

from ptx.driver import EmulatedDriver, emulated

from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.kernels.ops import Modulation
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import NarrowReferenceBackend
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.quant.choices import Grid

BF16 = torch.bfloat16


@pytest.fixture(scope="module", params=[80, 90], ids="sm{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[EmulatedDriver]:
    with emulated(request.param) as driver:
        yield driver


@pytest.fixture
def wide(gpu: EmulatedDriver) -> TritonBackend:
    return TritonBackend(activations=torch.float32)


@pytest.fixture
def narrow(gpu: EmulatedDriver) -> TritonBackend:
    return TritonBackend(activations=BF16)


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


def test_attention_tells_heads_and_images_apart(wide: TritonBackend) -> None:
    """One-hot values and keys of one sharp match: each query reads its own key's value."""
    length, heads, head_dim = 6, 2, 8
    qkv = torch.zeros(2, length, 3, heads, head_dim)
    for i in range(length):
        qkv[:, i, :2, :, i] = 40.0
    qkv[:, :, 2] = torch.arange(2 * length * heads).reshape(2, length, heads, 1) / 24
    out = wide.attention(qkv.reshape(2, length, -1), heads, True)
    torch.testing.assert_close(out, qkv[:, :, 2].reshape(2, length, -1), rtol=0, atol=1 / 100)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (29, 77, 131), (50, 256, 64)])
def test_linear(wide: TritonBackend, rows: int, width: int, outputs: int) -> None:
    x, weight, bias = tokens(rows, width), tokens(outputs, width, seed=1), tokens(1, outputs, seed=2)[0]
    exact = REFERENCE.linear(x.double(), weight.double(), bias.double())
    own = float((REFERENCE.linear(x, weight, bias) - exact).abs().max())
    y = wide.linear(x, weight, bias)
    assert float((y - exact).abs().max()) <= 2 * own + float(exact.abs().max()) * 2**-22
    assert torch.equal(wide.linear(x[-1:], weight, bias), y[-1:])


def test_wrong_shapes_are_refused_and_views_taken(wide: TritonBackend) -> None:
    layer, double = pack_layer(make_linear(36, 8, bits=2)), tokens(4, 72)
    view = double[:, ::2]
    assert torch.equal(wide.rotate_quantize(view, layer).codes, wide.rotate_quantize(view.clone(), layer).codes)
    with pytest.raises(ValueError, match=r"x must .*\(4, 36\)"):
        wide.rotate_quantize(double, layer)
    with pytest.raises(ValueError, match=r"3 rows .* 2 images"):
        wide.rotate_quantize(tokens(3, 36), layer, Modulation(torch.zeros(2, 36), torch.zeros(2, 36), 1e-6))
    with pytest.raises(ValueError, match="5 heads"):
        wide.attention(torch.zeros(1, 2, 36), 5, True)
    with pytest.raises(ValueError, match="head_dim"):
        wide.attention(torch.zeros(1, 2, 3 * 257), 1, True)
    with pytest.raises(ValueError, match="'relu'"):
        wide.rotate_quantize(tokens(3, 36), layer, "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "grid"), [(2, "midrise"), (3, "midtread")])
def test_a_whole_network(tmp_path: Path, wide: TritonBackend, narrow: TritonBackend, bits: int, grid: Grid) -> None:
    """It is the reference's in both dtypes of activations, and a row alone is itself among others, to the bit."""
    path = tmp_path / "model.safetensors"
    write_tiny(path, quant=QuantConfig(activation_bits=bits, grid=grid, rank=4))
    checkpoint = read_checkpoint(path)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(bits))
    timesteps, classes = torch.tensor([0, 250, 999]), torch.tensor([0, 10, 4])
    for backend, law in ((wide, REFERENCE), (narrow, NarrowReferenceBackend())):
        result = run_packed(TINY, checkpoint, backend, x, timesteps, classes)
        expected = run_packed(TINY, checkpoint, law, x, timesteps, classes)
        assert result.output.dtype is torch.float32
        assert_networks_agree(result, expected, bits, narrow=backend is narrow)
        alone = run_packed(TINY, checkpoint, backend, x[1:2], timesteps[1:2], classes[1:2])
        assert torch.equal(alone.output[0], result.output[1])


def test_512_px_is_the_references(tmp_path: Path, wide: TritonBackend) -> None:
    """Latents of 64 x 64 in patches of 2: 1,024 tokens."""
    shape = {"input_size": 64, "patch_size": 2, "depth": 1, "num_heads": 1, "hidden_size": 16}
    config = TINY.model_copy(update=shape)
    write_tiny(tmp_path / "model.safetensors", config, QuantConfig(activation_bits=8, rank=4))
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    timesteps, classes = torch.tensor([400]), torch.tensor([3])
    expected = run_packed(config, checkpoint, REFERENCE, x, timesteps, classes)
    result = run_packed(config, checkpoint, wide, x, timesteps, classes)
    assert float(relative_errors(result.output, expected.output).max()) < 0.02
