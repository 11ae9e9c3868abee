"""The Triton kernels of a ternary layer against the reference, in Triton's interpreter, on the CPU.

Triton reads ``TRITON_INTERPRET`` when kernels are defined, so these tests run in a process of their own: without the
variable, this file holds one test that starts that process.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_kernels_in_the_interpreter() -> None:
        assert_passes_interpreted(__file__)

else:
    from agreement import REFERENCE, assert_quantized_agree
    from layer_cases import make_linear, prologues, tokens

    from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
    from robuq_core.kernels.pack_layer import pack_layer
    from robuq_core.kernels.triton import rotate_quantize as rotation
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton import tuning
    from robuq_core.kernels.triton.backend import TritonBackend
    from robuq_core.kernels.triton.config import LaunchConfig
    from robuq_core.quant.choices import Grid
    from robuq_core.quant.packing import pack_planar, unpack_planar

    # Every base order (1, 12, 20, 28, 36), one and several columns a token, with and without a tail.
    WIDTHS = (4, 12, 28, 36, 80, 256, 288)

    def rotate(x: torch.Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        return rotation.rotate_quantize(x, layer, prologue, rotation.default_config(layer.in_features))

    def multiply(x: Quantized, layer: TernaryLayer, rows: int | None = None, expand: bool = False) -> torch.Tensor:
        """``rows``: the row count that the launch shape is chosen for, the actual one by default."""
        config = product.default_config(rows or max(1, x.codes.shape[0]), layer.out_features, 90)
        return product.ternary_linear(
            x, layer, config, unpack_planar(layer.planar, layer.in_features) if expand else None
        )

    def assert_codes_agree(x: torch.Tensor, layer: TernaryLayer, prologue: Prologue, actual: Quantized) -> None:
        differ = assert_quantized_agree(x, layer, prologue, actual)
        # Rounding in another order moves few values over an edge: a wrong kernel would move many.
        assert float(differ.float().mean()) < 1e-2

    @pytest.mark.parametrize("grid", ["midrise", "midtread"])
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_codes_scales_and_low_rank(bits: int, grid: Grid) -> None:
        for i, width in enumerate(WIDTHS):
            rows, rank = ((1, 0), (3, 2), (9, 3))[(bits + i) % 3]
            layer = pack_layer(make_linear(width, 7, bits=bits, grid=grid, rank=rank))
            x = tokens(rows, width, seed=bits)
            for prologue in prologues(3 if rows % 3 == 0 else 1, width):
                assert_codes_agree(x, layer, prologue, rotate(x, layer, prologue))

    @pytest.mark.parametrize("width", [384, 1152, 4608])
    def test_widths_of_the_published_models(width: int) -> None:
        layer, x = pack_layer(make_linear(width, 33, bits=3, rank=16)), tokens(3, width)
        for prologue in prologues(1, width):
            assert_codes_agree(x, layer, prologue, rotate(x, layer, prologue))

    @pytest.mark.parametrize(
        ("width", "block"), [(36, 1), (128, 128), (384, 128), (1152, 128), (1152, 1), (16384, 128)]
    )
    def test_rotation_by_blocks(width: int, block: int) -> None:
        layer, x = pack_layer(make_linear(width, 5, bits=3, rank=2, rotation_block=block)), tokens(3, width)
        for prologue in (None, "gelu"):
            assert_codes_agree(x, layer, prologue, rotate(x, layer, prologue))

    def test_a_rotation_block_that_the_kernel_cannot_split_is_named() -> None:
        layer = pack_layer(make_linear(144, 5, bits=3, rotation_block=36))
        with pytest.raises(ValueError, match="power of two that divides the width 144, not 36"):
            rotate(tokens(1, 144), layer, None)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("expand", [False, True])
    @pytest.mark.parametrize("width", [36, 128, 1152])
    def test_integer_product_is_exact(width: int, bits: int, expand: bool) -> None:
        """Unit scales, no bias and no low-rank term leave the bare product."""
        generator = torch.Generator().manual_seed(bits)
        weight = torch.randint(-1, 2, (37, width), generator=generator).to(torch.int8)
        weight[0], weight[1] = 1, -1
        top = 127 if bits == 8 else 2**bits - 1
        codes = torch.randint(-top, top + 1, (5, width), generator=generator).to(torch.int8)
        codes[0], codes[1] = top, -128 if bits == 8 else -top
        layer = TernaryLayer(
            planar=pack_planar(weight),
            alpha=torch.ones(37),
            bias=torch.zeros(37),
            signs=torch.ones(width),
            lowrank_a=torch.zeros(37, 0),
            lowrank_b=torch.zeros(0, width),
            bits=bits,
            grid="midrise",
        )
        y = multiply(Quantized(codes, torch.ones(5), torch.zeros(5, 0)), layer, expand=expand)
        assert torch.equal(y.long(), codes.long() @ weight.long().T)

    @pytest.mark.parametrize(("rows", "outputs", "rank"), [(1, 1, 0), (3, 33, 5), (17, 70, 16), (70, 131, 1)])
    def test_ternary_linear_is_as_exact_as_torch(rows: int, outputs: int, rank: int) -> None:
        """At most twice torch's own float32 error, measured against float64."""
        for width in (36, 128, 288):
            layer = pack_layer(make_linear(width, outputs, bits=3, rank=min(rank, outputs - 1)))
            x = REFERENCE.rotate_quantize(tokens(rows, width), layer)
            weight = unpack_planar(layer.planar, width).double()
            exact = (x.codes.double() @ weight.T) * (x.scales[:, None].double() * layer.alpha.double())
            exact = exact + x.lowrank.double() @ layer.lowrank_a.double().T + layer.bias.double()
            own = float((REFERENCE.ternary_linear(x, layer) - exact).abs().max())
            rounding = float(exact.abs().max()) * 2**-23
            assert float((multiply(x, layer) - exact).abs().max()) <= 2 * own + rounding

    def test_low_rank_factors_keep_float32() -> None:
        layer = pack_layer(make_linear(36, 40, bits=2, rank=4))
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(40, 4, generator=generator)  # not rounded to bf16 as a file would
        layer = TernaryLayer(
            layer.planar, layer.alpha, layer.bias, layer.signs, factor, layer.lowrank_b, layer.bits, layer.grid
        )
        x = REFERENCE.rotate_quantize(tokens(5, 36), layer)
        torch.testing.assert_close(multiply(x, layer), REFERENCE.ternary_linear(x, layer), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("width", [36, 288])
    def test_rows_are_byte_equal_alone_and_among_others(width: int) -> None:
        layer, x = pack_layer(make_linear(width, 70, bits=2, rank=3)), tokens(36, width)
        for prologue in prologues(4, width):
            whole = rotate(x, layer, prologue)
            y = multiply(whole, layer)
            # One launch shape here: numpy, which multiplies in the interpreter, adds in an order of its own by shape.
            for row in (0, 20, 35):
                own = prologue
                if isinstance(prologue, Modulation):
                    image = slice(row // 9, row // 9 + 1)
                    own = Modulation(prologue.shift[image], prologue.scale[image], prologue.eps)
                alone = rotate(x[row : row + 1], layer, own)
                for name in ("codes", "scales", "lowrank"):
                    assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name
                assert torch.equal(multiply(alone, layer, rows=36)[0], y[row])

    @pytest.mark.parametrize("expand", [False, True])
    def test_tile_sizes_do_not_change_a_byte_without_low_rank(expand: bool) -> None:
        layer = pack_layer(make_linear(288, 150, bits=4))
        x = REFERENCE.rotate_quantize(tokens(40, 288), layer)
        results = [multiply(x, layer, rows=rows, expand=expand) for rows in (1, 40, 4096)]
        assert all(torch.equal(y, results[0]) for y in results)

    def test_a_measured_launch_shape_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
        layer = pack_layer(make_linear(36, 40, bits=2, rank=3))
        backend, used = TritonBackend(), []
        x = backend.rotate_quantize(tokens(5, 36), layer)
        launch = product.ternary_linear

        def watched(x: Quantized, layer: TernaryLayer, config: LaunchConfig, **named: Any) -> torch.Tensor:
            used.append(config)
            return launch(x, layer, config, **named)

        monkeypatch.setattr(product, "ternary_linear", watched)
        expected = backend.ternary_linear(x, layer)
        measured = LaunchConfig({"ROWS": 32, "OUTPUTS": 64, "GROUP": 4}, 4, 2)
        backend._tuned = {tuning.ternary_linear_key(5, 40, 36, 3): measured}
        torch.testing.assert_close(backend.ternary_linear(x, layer), expected)
        assert used == [product.default_config(5, 40, backend.architecture), measured]

    def test_no_rows_give_no_rows() -> None:
        layer = pack_layer(make_linear(36, 8, bits=2, rank=1))
        assert multiply(rotate(torch.zeros(0, 36), layer), layer).shape == (0, 8)

    def test_a_token_of_zeros_gives_the_bias() -> None:
        layer = pack_layer(make_linear(36, 8, bits=2, rank=1))
        assert torch.equal(multiply(rotate(torch.zeros(1, 36), layer), layer)[0], layer.bias)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_tokens_stay_in_their_rows(value: float) -> None:
        layer, x = pack_layer(make_linear(288, 8, bits=2, rank=1)), tokens(3, 288)
        clean = multiply(rotate(x, layer), layer)
        x[1, 4] = value
        for prologue in (None, "gelu", "silu", Modulation(torch.zeros(1, 288), torch.zeros(1, 288), 1e-6)):
            quantized = rotate(x, layer, prologue)
            assert quantized.scales.isfinite().tolist() == [True, False, True]
            assert quantized.lowrank.isfinite().all(dim=1).tolist() == [True, False, True]
        y = multiply(rotate(x, layer), layer)
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert not y[1].isfinite().any()
