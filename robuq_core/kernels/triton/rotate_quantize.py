"""Prologue, rotation and per-token quantisation of the tokens, eq. (1), (4), and beside it the low-rank projection.

The first programs of a launch project 32 tokens each (:mod:`robuq_core.kernels.triton.lowrank`), the others rotate
(:mod:`robuq_core.kernels.triton.rotation`). The second axis of the grid is the layer of a group: one input, several
layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.ops import Modulation, Prologue, Quantized
from robuq_core.kernels.triton.config import MIN_ROWS, gelu, launching, power_of_2, rounded, silu
from robuq_core.kernels.triton.lowrank import PROJECTED, project
from robuq_core.kernels.triton.rotation import default_config, main_rows, mix_columns, mix_rows, rotate_by_128
from robuq_core.kernels.triton.weights import Weights
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise

LEAST_ROWS = tl.constexpr(MIN_ROWS)
NO_PROLOGUE, MODULATE, GELU, SILU = range(4)


@triton.jit
def _prologue(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 2:
        x = gelu(x)
    elif KIND == 3:
        x = silu(x)
    return x


@triton.jit
def _along(x, AXIS: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.max(x, AXIS) if LARGEST else tl.sum(x, AXIS)


@triton.jit
def _both(a, b, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b) if LARGEST else a + b


@triton.jit
def _by_token(x, t, column, COLUMNS: tl.constexpr, TAIL: tl.constexpr, LARGEST: tl.constexpr = False):  # type: ignore[no-untyped-def]
    """The sum of each token, or its ``LARGEST`` value, over tile ``x`` and, if there is a tail, ``t``: ``[columns]``,
    in every column of the token.

    Columns of several tokens exchange partial sums: a reshape to tokens and back would spill the whole tile. A tile of
    one token is added up along its rows first, which stay within a warp.
    """
    if x.shape[1] == COLUMNS:
        one = _along(tl.reshape(_along(x, 1, LARGEST), [1, x.shape[0]]), 1, LARGEST)
        if TAIL > 0:
            one = _both(one, _along(tl.reshape(_along(t, 1, LARGEST), [1, t.shape[0]]), 1, LARGEST), LARGEST)
        total = tl.broadcast_to(one, [COLUMNS])
    else:
        total = _along(x, 0, LARGEST)
        if TAIL > 0:
            total = _both(total, _along(t, 0, LARGEST), LARGEST)
        for i in tl.static_range(10):
            if (1 << i) < COLUMNS:
                total = _both(total, tl.gather(total, column ^ (1 << i), axis=0), LARGEST)
    return total


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    """``|x|``, infinite where x is NaN: a maximum may pass over NaN."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def _codes(z, inverse_step, top, real, MIDRISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as floats, 0 where there is no value."""
    v = z * inverse_step
    if MIDRISE:
        v = tl.minimum(tl.maximum(tl.floor(v) * 2.0 + 1.0, -top), top)
    else:
        v = rounded(tl.minimum(tl.maximum(v, -top - 1.0), top))
    return tl.where(real, v, 0.0)


@triton.jit(do_not_specialize=["tokens_total", "tokens_per_image", "eps", "step_factor", "top"])
def rotate_quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    left_ptr,
    right_ptr,
    folded_ptr,
    codes_ptr,
    sums_ptr,
    scales_ptr,
    lowrank_ptr,
    tokens_total,
    tokens_per_image,
    eps,
    step_factor,
    top,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    MIDRISE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    projections = tl.cdiv(tokens_total, PROJECTED) if RANK > 0 else 0
    tile = tl.program_id(0) - projections
    if tile < 0:
        if RANK > 0:
            b_ptr, out_ptr = folded_ptr + layer * (RANK * K), lowrank_ptr + layer * (RANK * tokens_total)
            modulation = (shift_ptr, scale_ptr, tokens_per_image, eps)
            project(x_ptr, modulation, b_ptr, out_ptr, tl.program_id(0), tokens_total, K, RANK, KIND, PARTS)
    else:
        COLUMNS: tl.constexpr = K // ROWS
        MAIN: tl.constexpr = main_rows(ROWS)
        TAIL: tl.constexpr = ROWS - MAIN
        MAIN_TILE: tl.constexpr = power_of_2(MAIN, LEAST_ROWS)
        TAIL_TILE: tl.constexpr = power_of_2(TAIL, LEAST_ROWS) if TAIL > 0 else 0
        SIZE: tl.constexpr = MAIN_TILE + TAIL_TILE
        WIDTH: tl.constexpr = TOKENS * COLUMNS
        column = tl.arange(0, WIDTH)
        token = tile * TOKENS + column // COLUMNS
        live = token < tokens_total
        # One 64-bit base for the program, 32-bit offsets within it.
        start = tile.to(tl.int64) * (TOKENS * K)
        x_from, codes_to = x_ptr + start, codes_ptr + layer * tokens_total * K + start
        signs_from = signs_ptr + layer * K
        base = (column // COLUMNS) * K

        row = tl.arange(0, MAIN_TILE)
        k = row[:, None] * COLUMNS + (column % COLUMNS)[None, :]
        real = (row < MAIN)[:, None] if MAIN < MAIN_TILE else (row >= 0)[:, None]
        here = real & live[None, :]
        x = _prologue(tl.load(x_from + base[None, :] + k, mask=here, other=0.0).to(tl.float32), KIND)
        t = x  # stands for no tail
        if TAIL > 0:
            tail_row = tl.arange(0, TAIL_TILE)
            tail_k = (MAIN + tail_row)[:, None] * COLUMNS + (column % COLUMNS)[None, :]
            tail_real = (tail_row < TAIL)[:, None]
            tail_here = tail_real & live[None, :]
            t = _prologue(tl.load(x_from + base[None, :] + tail_k, mask=tail_here, other=0.0).to(tl.float32), KIND)

        if KIND == 1:
            mean = (_by_token(x, t, column, COLUMNS, TAIL) * (1.0 / K))[None, :]
            x = tl.where(here, x - mean, 0.0)
            if TAIL > 0:
                t = tl.where(tail_here, t - mean, 0.0)
            variance = _by_token(x * x, t * t, column, COLUMNS, TAIL) * (1.0 / K)
            inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[None, :]
            image = (token // tokens_per_image) * K
            scale = tl.load(scale_ptr + image[None, :] + k, mask=here, other=0.0)
            x = x * inverse * (1.0 + scale) + tl.load(shift_ptr + image[None, :] + k, mask=here, other=0.0)
            if TAIL > 0:
                scale = tl.load(scale_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
                shift = tl.load(shift_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
                t = t * inverse * (1.0 + scale) + shift

        x *= tl.load(signs_from + k, mask=real, other=0.0)
        if TAIL > 0:
            t *= tl.load(signs_from + tail_k, mask=tail_real, other=0.0)
        if BLOCK == 128 and TOKENS == 1:
            z = rotate_by_128(x)
            zt = rotate_by_128(t) if TAIL > 0 else z
        else:
            # To fp16's range, by a power of two: after the first product |x| COLUMNS <= 2^14. A bfloat16 stays exact,
            # down to 2^-33 of the largest. A token that is not finite becomes zeros here, since zero times NaN would
            # reach its neighbours in the product, and NaN again after it.
            EXACT: tl.constexpr = KIND == 0 and x_ptr.dtype.element_ty == tl.bfloat16
            largest = tl.maximum(_by_token(_magnitude(x), _magnitude(t), column, COLUMNS, TAIL, True), 1e-30)
            finite = largest < float("inf")
            power = tl.div_rn(16384.0 / COLUMNS, largest).to(tl.int32, bitcast=True) & 0x7F800000
            grow = power.to(tl.float32, bitcast=True)[None, :]
            shrink = tl.where(finite[None, :], tl.div_rn(BLOCK**-0.5, grow), float("nan"))
            x = tl.where(finite[None, :], x, 0.0)
            right = tl.load(right_ptr + column[:, None] * WIDTH + column[None, :])
            x = mix_columns(x * grow, right, EXACT)
            z = tl.zeros([MAIN_TILE, WIDTH], tl.float32)
            zt = z
            if TAIL > 0:
                t = tl.where(finite[None, :], t, 0.0)
                t = mix_columns(t * grow, right, EXACT)
                at = MAIN_TILE + tail_row
                z = mix_rows(tl.load(left_ptr + row[:, None] * SIZE + at[None, :]), t, z)
                zt = tl.zeros([TAIL_TILE, WIDTH], tl.float32)
                zt = mix_rows(tl.load(left_ptr + at[:, None] * SIZE + at[None, :]), t, zt)
                zt = mix_rows(tl.load(left_ptr + at[:, None] * SIZE + row[None, :]), x, zt) * shrink
            z = mix_rows(tl.load(left_ptr + row[:, None] * SIZE + row[None, :]), x, z) * shrink

        step = _by_token(tl.abs(z), tl.abs(zt), column, COLUMNS, TAIL) * (1.0 / K) * step_factor
        inverse_step = tl.div_rn(1.0, tl.maximum(step, 1e-30))[None, :]
        codes = _codes(z, inverse_step, top, real, MIDRISE)
        tail_codes = codes
        tl.store(codes_to + base[None, :] + k, codes.to(tl.int8), mask=here)
        if TAIL > 0:
            tail_codes = _codes(zt, inverse_step, top, tail_real, MIDRISE)
            tl.store(codes_to + base[None, :] + tail_k, tail_codes.to(tl.int8), mask=tail_here)
        first = live & (column % COLUMNS == 0)
        tl.store(scales_ptr + layer * tokens_total + token, step * (0.5 if MIDRISE else 1.0), mask=first)
        # Integers below 2^24: exact in any order.
        tl.store(
            sums_ptr + layer * tokens_total + token,
            _by_token(codes, tail_codes, column, COLUMNS, TAIL).to(tl.int32),
            mask=first,
        )


def rotate_quantize(x: Tensor, weights: Weights, prologue: Prologue) -> Quantized:
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.NarrowBackend`.

    Of a group of layers, every result has their number as its first dimension.
    """
    rows, layer, lead, (_, width, rank) = x.shape[0], weights.layer, weights.lead, weights.shape
    codes = torch.empty(*lead, rows, width, dtype=torch.int8, device=x.device)
    sums = torch.empty(*lead, rows, dtype=torch.int32, device=x.device)
    scales, lowrank = (torch.empty(*lead, *shape, device=x.device) for shape in ((rows,), (rows, rank)))
    kind, shift, scale, per_image, eps = NO_PROLOGUE, x, x, 1, 0.0
    if isinstance(prologue, Modulation):
        shift, scale, eps = prologue.shift, prologue.scale, prologue.eps
        kind, per_image = MODULATE, max(1, rows // shift.shape[0])
    elif prologue is not None:
        kind = GELU if prologue == "gelu" else SILU
    if rows:
        bits, midrise, config = layer.bits, is_midrise(layer.bits, layer.grid), default_config(width)
        projections = triton.cdiv(rows, PROJECTED.value) if rank else 0
        grid = (projections + triton.cdiv(rows, config.blocks["TOKENS"]), *lead)
        with launching(x):
            rotate_quantize_kernel[grid](
                *(x, shift, scale, layer.signs, weights.left, weights.right, layer.lowrank_b),
                *(codes, sums, scales, lowrank, rows, per_image, eps),
                # Numbers of the grid at run time: bit widths share a kernel.
                SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits],
                float(2**bits - 1 if midrise else 2 ** (bits - 1) - 1),
                *(width, layer.rotation_block or width, rank, kind, midrise),
                **config.options(),
            )
    return Quantized(codes, scales, lowrank, sums)
