"""Activations in bfloat16 on the Triton backend, in Triton's interpreter: the float32 kernels on the same values, and
their results rounded once.

Triton reads ``TRITON_INTERPRET`` when kernels are defined, so these tests run in a process of their own: without the
variable, this file holds one test that starts that process.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from interpreter import assert_passes_interpreted

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_bfloat16_in_the_interpreter() -> None:
        assert_passes_interpreted(__file__)

else:
    import triton
    import triton.language as tl
    from agreement import REFERENCE, Run, assert_networks_agree, assert_quantized_agree, relative_errors, run_packed
    from layer_cases import make_linear, prologues, tokens
    from tiny import TINY, write_tiny

    from robuq_core.checkpoint import read_checkpoint
    from robuq_core.config import QuantConfig
    from robuq_core.kernels.ops import Backend, Modulation, Quantized, whole_layer
    from robuq_core.kernels.pack_layer import pack_layer
    from robuq_core.kernels.reference import NarrowReferenceBackend
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton.backend import TritonBackend
    from robuq_core.kernels.triton.elementwise import rounded_for
    from robuq_core.quant.activation import GAUSSIAN_STEP

    BF16 = torch.bfloat16
    WIDE, NARROW = TritonBackend(), TritonBackend(activations=BF16)

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, SIZE)
        tl.store(y_ptr + i, rounded_for(y_ptr, tl.load(x_ptr + i)))

    def test_rounding_is_torchs() -> None:
        """Ties to even at every exponent, infinities, the largest values, subnormals, NaN."""
        bits = torch.arange(256).repeat_interleave(16) << 23 | torch.tensor([0, 1, 2, 127]).repeat(1024) << 16
        bits += torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat_interleave(4).repeat(256)
        x = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
        y = torch.empty(x.shape, dtype=BF16)
        copy_kernel[(1,)](x, y, SIZE=x.numel())
        number = ~x.isnan()
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[number].view(torch.int16), x.to(BF16)[number].view(torch.int16))

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_codes_of_bfloat16_are_those_of_the_same_values(bits: int) -> None:
        for i, width in enumerate((4, 36, 80, 288)):
            rows, grid = ((1, 3, 9)[(bits + i) % 3], ("midrise", "midtread")[i % 2])
            layer = pack_layer(make_linear(width, 7, bits=bits, grid=grid, rank=2))  # type: ignore[arg-type]
            x = tokens(rows, width, seed=bits).to(BF16)
            for prologue in prologues(1 if rows == 1 else 3, width):
                found, same = (NARROW.rotate_quantize(values, layer, prologue) for values in (x, x.float()))
                for name in ("codes", "scales", "lowrank"):
                    assert torch.equal(getattr(found, name), getattr(same, name)), name
                assert float(assert_quantized_agree(x.float(), layer, prologue, found).float().mean()) < 1e-2

    @pytest.mark.parametrize(("rows", "outputs", "rank"), [(1, 1, 0), (3, 33, 5), (17, 70, 16), (70, 131, 1)])
    def test_a_product_is_the_float32_one_rounded_once(rows: int, outputs: int, rank: int) -> None:
        for width in (36, 288):
            layer = pack_layer(make_linear(width, outputs, bits=3, rank=min(rank, outputs - 1)))
            x = REFERENCE.rotate_quantize(tokens(rows, width), layer)
            y, exact = NARROW.ternary_linear(x, layer, BF16), NARROW.ternary_linear(x, layer)
            assert exact.dtype is torch.float32
            assert torch.equal(y, exact.to(BF16))
            # Half a unit in the last of 8 bits, and the float32 kernel's own error.
            torch.testing.assert_close(y.float(), REFERENCE.ternary_linear(x, layer), rtol=2**-8, atol=1e-5)

    @pytest.mark.parametrize(("length", "heads", "head_dim"), [(1, 1, 1), (7, 3, 8), (67, 2, 72), (129, 1, 20)])
    @pytest.mark.parametrize("quantized", [True, False])
    def test_attention_is_the_float32_one_rounded_once(length: int, heads: int, head_dim: int, quantized: bool) -> None:
        qkv = tokens(2 * length, 3 * heads * head_dim).reshape(2, length, -1).to(BF16)
        found = NARROW.attention(qkv, heads, quantized)
        assert found.dtype is BF16
        assert torch.equal(found, NARROW.attention(qkv.float(), heads, quantized).to(BF16))
        # A probability on the edge between two codes may fall either way: 1/255 of the largest value.
        law, largest = REFERENCE.attention(qkv.float(), heads, quantized), float(qkv.abs().max())
        torch.testing.assert_close(found.float(), law, rtol=2**-8, atol=2 * largest / 255 if quantized else 1e-5)

    def test_rows_are_byte_equal_alone_and_among_others() -> None:
        layer, x = pack_layer(make_linear(288, 70, bits=2, rank=3)), tokens(36, 288).to(BF16)
        # One launch shape: numpy, which multiplies in the interpreter, adds in an order of its own by shape.
        config = product.default_config(36, 70, 90)
        for prologue in prologues(4, 288):
            whole = NARROW.rotate_quantize(x, layer, prologue)
            y = product.ternary_linear(whole, layer, config, dtype=BF16)
            for row in (0, 20, 35):
                own = prologue
                if isinstance(prologue, Modulation):
                    image = slice(row // 9, row // 9 + 1)
                    own = Modulation(prologue.shift[image], prologue.scale[image], prologue.eps)
                alone = NARROW.rotate_quantize(x[row : row + 1], layer, own)
                for name in ("codes", "scales", "lowrank"):
                    assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name
                assert torch.equal(product.ternary_linear(alone, layer, config, dtype=BF16)[0], y[row])

    def test_a_picture_attends_as_if_alone() -> None:
        qkv = tokens(3 * 35, 3 * 72).reshape(3, 35, -1).to(BF16)
        for quantized in (True, False):
            together = NARROW.attention(qkv, 2, quantized)
            for i in range(3):
                assert torch.equal(NARROW.attention(qkv[i : i + 1], 2, quantized)[0], together[i])

    def test_nothing_and_what_is_not_finite() -> None:
        layer = pack_layer(make_linear(36, 8, bits=2, rank=1))
        none = NARROW.rotate_quantize(torch.zeros(0, 36, dtype=BF16), layer)
        assert NARROW.ternary_linear(none, layer, BF16).shape == (0, 8)
        assert NARROW.attention(torch.zeros(0, 9, 36, dtype=BF16), 2, True).shape == (0, 9, 12)
        x = tokens(3, 36).to(BF16)
        x[1, 4] = float("nan")
        y = NARROW.ternary_linear(NARROW.rotate_quantize(x, layer), layer, BF16)
        assert y.isfinite().all(dim=1).tolist() == [True, False, True]
        assert y[1].isnan().all()

    def test_other_dtypes_are_refused() -> None:
        layer, x = pack_layer(make_linear(36, 8, bits=2)), tokens(1, 36)
        quantized = NARROW.rotate_quantize(x, layer)
        with pytest.raises(ValueError, match=r"must be torch.float32 or torch.bfloat16, not torch.float16"):
            TritonBackend(activations=torch.float16)
        with pytest.raises(ValueError, match=r"not torch.float16"):
            NARROW.ternary_linear(quantized, layer, torch.float16)
        with pytest.raises(ValueError, match=r"x must be torch.float32 or torch.bfloat16"):
            NARROW.rotate_quantize(x.half(), layer)
        quantized = Quantized(quantized.codes, quantized.scales.to(BF16), quantized.lowrank)
        with pytest.raises(ValueError, match=r"scales must be torch.float32 \(1,\)"):
            NARROW.ternary_linear(quantized, layer)

    def test_only_what_is_handed_on_is_narrow_and_planes_are_added_before_they_are_rounded() -> None:
        for planes in (1, 2):
            layer = pack_layer(make_linear(36, 8, bits=3, planes=planes))
            x = tokens(5, 36)
            exact = whole_layer(NARROW)(x, layer)
            assert exact.dtype is torch.float32
            assert torch.equal(whole_layer(NARROW, handed_on=True)(x, layer), exact.to(BF16))
            assert torch.equal(whole_layer(WIDE, handed_on=True)(x, layer), exact)

    @pytest.mark.parametrize("bits", [1, 2, 8])
    def test_a_whole_network(tmp_path: Path, bits: int) -> None:
        """It agrees with its reference. From the network in float32 it differs by the codes that rounding flips.

        An error e at a quantiser's input, in units of sigma, flips a code with a chance of about e by the step, and
        the code is then off by a step: sqrt(e step) comes out. From layer to layer that tends to a step, from below.
        """
        path = tmp_path / "model.safetensors"
        write_tiny(path, quant=QuantConfig(activation_bits=bits, rank=4))
        checkpoint = read_checkpoint(path)
        x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(bits))

        def run(backend: Backend) -> Run:
            return run_packed(TINY, checkpoint, backend, x, torch.tensor([0, 250, 999]), torch.tensor([0, 10, 4]))

        wide, narrow, reference = run(WIDE), run(NARROW), run(NarrowReferenceBackend())
        assert narrow.output.dtype is torch.float32
        assert_networks_agree(narrow, reference, bits, narrow=True)
        assert 0 < float(relative_errors(narrow.output, wide.output).max()) < GAUSSIAN_STEP[bits] / 2
