"""The Triton kernels of a ternary layer, in the emulator: against the reference or float64, rows alone and among others
to the bit."""

from __future__ import annotations

import pytest
import torch
from agreement import REFERENCE, assert_products_agree, assert_quantized_agree
from layer_cases import make_linear, prologues, tokens
from torch import Tensor

pytest.importorskip("triton")

from ptx.driver import emulated

from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer, fused_linear
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.triton import ternary_linear as product
from robuq_core.kernels.triton import tuning
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.kernels.triton.config import SHARED_LIMIT, LaunchConfig
from robuq_core.quant.choices import Grid
from robuq_core.quant.packing import pack_planar

BF16 = torch.bfloat16
GRIDS: tuple[Grid, Grid] = ("midrise", "midtread")
# Every base order (1, 12, 20, 28, 36), one and several columns a token, with and without a tail.
WIDTHS = (4, 12, 28, 36, 80, 256, 288)


def assert_codes_agree(x: Tensor, layer: TernaryLayer, prologue: Prologue, actual: Quantized) -> None:
    differ = assert_quantized_agree(x.float(), layer, prologue, actual)
    # Rounding in another order moves few values over an edge: a wrong kernel would move many.
    assert float(differ.float().mean()) < 1e-2


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_scales_and_low_rank_at_every_bit_width(wide: TritonBackend, bits: int) -> None:
    for i, grid in enumerate(GRIDS):
        width, rows, rank = WIDTHS[(bits + 3 * i) % 7], (1, 3, 9)[bits % 3], (0, 2, 3)[(bits + i) % 3]
        layer = pack_layer(make_linear(width, 7, bits=bits, grid=grid, rank=rank))
        x, prologue = tokens(rows, width, seed=bits), prologues(1, width)[(bits + i) % 4]
        assert_codes_agree(x, layer, prologue, wide.rotate_quantize(x, layer, prologue))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_prologue_at_every_kind_of_width(ops: TritonBackend, width: int) -> None:
    layer, x = pack_layer(make_linear(width, 7, bits=3, rank=2)), tokens(9, width)
    for prologue in prologues(3, width)[width // 4 % 2 :: 2]:
        read = x if isinstance(prologue, Modulation) else x.to(ops.activations)
        assert_codes_agree(read, layer, prologue, ops.rotate_quantize(read, layer, prologue))


@pytest.mark.parametrize("width", [1152, 4608])
def test_widths_of_the_published_models(wide: TritonBackend, width: int) -> None:
    layer, x = pack_layer(make_linear(width, 33, bits=3, rank=16)), tokens(3, width)
    prologue = prologues(1, width)[3 if width == 1152 else 1]
    assert_codes_agree(x, layer, prologue, wide.rotate_quantize(x, layer, prologue))


@pytest.mark.parametrize(
    ("width", "block", "dtype"),
    [(36, 1, BF16), (384, 128, BF16), *((width, 128, dtype) for width in (1152, 1792, 4608) for dtype in (BF16, None))],
)
def test_rotation_by_blocks(wide: TritonBackend, width: int, block: int, dtype: torch.dtype | None) -> None:
    """With a tail of rows, without, and with padded rows; a token that is not finite stays by itself."""
    layer, x = pack_layer(make_linear(width, 5, bits=3, rank=2, rotation_block=block)), tokens(3, width).to(dtype)
    whole = wide.rotate_quantize(x, layer)
    assert_codes_agree(x, layer, None, whole)
    x[1, 4] = float("nan")
    broken = wide.rotate_quantize(x, layer)
    assert broken.scales.isfinite().tolist() == [True, False, True]
    assert torch.equal(broken.codes[::2], whole.codes[::2])


@pytest.mark.parametrize("width", [36, 128, 1152])
def test_the_integer_product_is_exact_at_every_bit_width(wide: TritonBackend, width: int) -> None:
    """Unit scales, no bias and no low-rank term leave the bare product."""
    generator = torch.Generator().manual_seed(width)
    weight = torch.randint(-1, 2, (37, width), generator=generator).to(torch.int8)
    weight[0], weight[1] = 1, -1
    for bits in range(1, 9):
        top = 127 if bits == 8 else 2**bits - 1
        codes = torch.randint(-top, top + 1, (5, width), generator=generator).to(torch.int8)
        codes[0], codes[1] = top, -128 if bits == 8 else -top
        ones, zeros = torch.ones(37), torch.zeros(37)
        rank_0 = torch.zeros(37, 0, dtype=BF16), torch.zeros(0, width, dtype=BF16)
        layer = TernaryLayer(pack_planar(weight), ones, zeros, torch.ones(width), *rank_0, bits, "midrise")
        y = wide.ternary_linear(Quantized(codes, torch.ones(5), torch.zeros(5, 0)), layer)
        assert torch.equal(y.long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize(("rows", "outputs", "rank"), [(1, 1, 0), (3, 33, 5), (17, 70, 16), (70, 131, 1)])
def test_a_product_is_exact_to_rounding(wide: TritonBackend, rows: int, outputs: int, rank: int) -> None:
    """To rounding; in bfloat16 it is that, rounded once."""
    for width in (36, 288):
        layer = pack_layer(make_linear(width, outputs, bits=3, rank=min(rank, outputs - 1)))
        x = REFERENCE.rotate_quantize(tokens(rows, width), layer)
        y = wide.ternary_linear(x, layer)
        assert_products_agree(y, x, layer)
        assert torch.equal(wide.ternary_linear(x, layer, BF16), y.to(BF16))


@pytest.mark.parametrize("width", [36, 288])
def test_rows_are_byte_equal_alone_and_among_others(ops: TritonBackend, width: int) -> None:
    """Tiles for one row, for 36 and for 80 differ; the modulated rows are of four images."""
    layer = pack_layer(make_linear(width, 70, bits=2, rank=3))
    for prologue in prologues(4, width)[0::3]:
        x = tokens(80, width) if isinstance(prologue, Modulation) else tokens(80, width).to(ops.activations)
        whole = ops.rotate_quantize(x, layer, prologue)
        y = ops.ternary_linear(whole, layer, ops.activations)
        for first, count in ((0, 1), (60, 20), (79, 1)):
            part, own = slice(first, first + count), prologue
            if isinstance(prologue, Modulation):
                image = slice(first // 20, first // 20 + 1)
                own = Modulation(prologue.shift[image], prologue.scale[image], prologue.eps)
            alone = ops.rotate_quantize(x[part], layer, own)
            for name in ("codes", "scales", "lowrank"):
                assert torch.equal(getattr(alone, name), getattr(whole, name)[part]), name
            assert torch.equal(ops.ternary_linear(alone, layer, ops.activations), y[part])


def test_adding_to_a_residual_is_the_layer_and_a_sum(ops: TritonBackend) -> None:
    layer, x = pack_layer(make_linear(288, 70, bits=2, rank=3)), tokens(6, 288).to(ops.activations)
    residual, gate = tokens(6, 70, seed=1), tokens(2, 70, seed=2)
    expected = residual + gate.repeat_interleave(3, dim=0) * fused_linear(REFERENCE)(x.float(), layer)
    alone = residual[4:5].clone()
    ops.add_ternary(residual, gate, x, layer)
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)
    ops.add_ternary(alone, gate[1:], x[4:5], layer)
    assert torch.equal(alone[0], residual[4])


def measured_shapes(layer: TernaryLayer, rows: int, architecture: int) -> list[LaunchConfig]:
    """Some of what tuning tries, and what the shipped tables hold, whose tiles fit so few rows."""
    limit = SHARED_LIMIT[architecture]
    tried = product.candidate_configs(rows, layer.in_features, layer.rank, architecture, limit)[::5]
    tables = [tuning.read_table(path) for path in tuning.SHIPPED.glob("*.json")]
    shipped = [config for table in tables for config in table.values()]
    return tried + list({str(config): config for config in shipped}.values())


def test_launch_shapes_do_not_change_a_byte(wide: TritonBackend) -> None:
    """What is tuned on a GPU keeps rows their own: in every tile the low-rank sum has one order."""
    layer = pack_layer(make_linear(288, 150, bits=4, rank=5))
    x = REFERENCE.rotate_quantize(tokens(70, 288), layer)
    expected = wide.ternary_linear(x, layer)
    for config in measured_shapes(layer, 70, wide.architecture):
        assert torch.equal(wide.ternary_linear(x, layer, config=config), expected), config


# One pass of the loop; two, of whole turns of the ring and of others; and the least.
@pytest.mark.parametrize(
    ("width", "outputs", "rows", "rank"), [(384, 260, 131, 32), (2048, 9, 17, 5), (2304, 9, 5, 5), (128, 9, 1, 0)]
)
def test_the_asynchronous_product_has_the_bits_of_the_other(width: int, outputs: int, rows: int, rank: int) -> None:
    layer, x = pack_layer(make_linear(width, outputs, bits=3, rank=rank)), tokens(rows, width)
    residual, gate = tokens(rows, outputs, seed=1), tokens(1, outputs, seed=2)
    with emulated(90):
        ops = TritonBackend()
        quantized, weights = ops.rotate_quantize(x, layer), ops._weights_of(layer)
        for tile in (128, 256):
            config = product.async_config(4096, tile, width, rank, 90)
            assert config is not None
            for dtype, gelu in ((torch.float32, False), (torch.bfloat16, True)):
                expected = ops.ternary_linear(quantized, layer, dtype, gelu)
                assert torch.equal(ops.ternary_linear(quantized, layer, dtype, gelu, config=config), expected)
            added = [
                ops._product(quantized, weights, each, epilogue=product.ADD, gate=gate, residual=residual.clone())
                for each in (None, config)
            ]
            assert torch.equal(*added)


def test_a_measured_launch_shape_is_used(wide: TritonBackend) -> None:
    layer = pack_layer(make_linear(36, 40, bits=2, rank=3))
    x = wide.rotate_quantize(tokens(5, 36), layer)
    impossible = LaunchConfig({"ROWS": 16, "OUTPUTS": 64, "GROUP": 8, "SPLIT": 5000}, 4, 3)
    wide._tuned = {tuning.ternary_linear_key(5, 40, 36, 3): impossible}
    with pytest.raises(ValueError, match="split in 5000"):
        wide.ternary_linear(x, layer)


def test_no_rows_give_no_rows_and_a_token_of_zeros_the_bias(ops: TritonBackend) -> None:
    layer = pack_layer(make_linear(36, 8, bits=2, rank=1))
    none = ops.rotate_quantize(torch.zeros(0, 36, dtype=ops.activations), layer)
    assert ops.ternary_linear(none, layer).shape == (0, 8)
    zeros = ops.rotate_quantize(torch.zeros(1, 36, dtype=ops.activations), layer)
    assert torch.equal(ops.ternary_linear(zeros, layer)[0], layer.bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tokens_stay_in_their_rows(ops: TritonBackend, value: float) -> None:
    layer, x = pack_layer(make_linear(288, 8, bits=2, rank=1)), tokens(3, 288).to(ops.activations)
    clean = ops.ternary_linear(ops.rotate_quantize(x, layer), layer)
    x[1, 4] = value
    for prologue in (None, "gelu"):
        quantized = ops.rotate_quantize(x, layer, prologue)
        assert quantized.scales.isfinite().tolist() == [True, False, True]
        assert quantized.lowrank.isfinite().all(dim=1).tolist() == [True, False, True]
    y = ops.ternary_linear(ops.rotate_quantize(x, layer), layer)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not y[1].isfinite().any()


def test_planes_are_added_before_they_are_rounded(wide: TritonBackend, narrow: TritonBackend) -> None:
    for planes in (1, 2):
        layer, x = pack_layer(make_linear(36, 8, bits=3, planes=planes)), tokens(5, 36)
        exact = fused_linear(wide)(x, layer)
        assert exact.dtype is torch.float32
        torch.testing.assert_close(exact, fused_linear(REFERENCE)(x, layer), rtol=1e-5, atol=1e-5)
        assert torch.equal(fused_linear(narrow, intermediate=True)(x, layer), exact.to(BF16))
