"""The low-rank projection of eq. (2) from the unrotated input: ``p(x) B'^T`` for a prologue p, with B' as
:func:`robuq_core.kernels.triton.weights.folded` makes it.

A program takes 32 tokens and the whole width, in fixed parts that are added up at the end, on the tensor cores in pairs
of tf32 values. Every sum has one order, whatever the number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robuq_core.kernels.triton.config import MIN_ROWS, gelu, power_of_2, silu, tf32_parts

# Tokens of a program, and values of a token at a time.
PROJECTED, STEP = tl.constexpr(32), tl.constexpr(32)
LEAST_RANK = tl.constexpr(MIN_ROWS)


@triton.jit
def _loaded(pointers, k, K: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    if MASKED:
        return tl.load(pointers, mask=k < K, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def project(  # type: ignore[no-untyped-def]
    x_ptr,
    modulation,
    folded_ptr,
    out_ptr,
    tile,
    tokens_total,
    K: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Tile ``tile`` of the tokens. ``KIND``: of the prologue, as of the rotation; ``modulation``: shift, scale, tokens
    per image and eps of its first kind."""
    shift_ptr, scale_ptr, tokens_per_image, eps = modulation
    SPAN: tl.constexpr = (K + PARTS * STEP - 1) // (PARTS * STEP) * STEP  # values of each part
    MASKED: tl.constexpr = PARTS * SPAN != K
    RANK_TILE: tl.constexpr = power_of_2(RANK, LEAST_RANK)
    row = tile * PROJECTED + tl.arange(0, PROJECTED)
    # Rows beyond the last read the last row: their results are dropped.
    row_in = tl.minimum(row, tokens_total - 1)
    x_row = x_ptr + (row_in.to(tl.int64) * K)[None, :, None]
    k0 = tl.arange(0, PARTS)[:, None] * SPAN + tl.arange(0, STEP)[None, :]
    j = tl.arange(0, RANK_TILE)

    if KIND == 1:
        total = tl.zeros([PARTS, PROJECTED, STEP], tl.float32)
        for start in range(0, SPAN, STEP):
            k = (k0 + start)[:, None, :]
            total += _loaded(x_row + k, k, K, MASKED)
        mean = (tl.sum(tl.sum(total, 2), 0) * (1.0 / K))[None, :, None]
        total = tl.zeros([PARTS, PROJECTED, STEP], tl.float32)
        for start in range(0, SPAN, STEP):
            k = (k0 + start)[:, None, :]
            x = _loaded(x_row + k, k, K, MASKED) - mean
            total += tl.where(k < K, x * x, 0.0) if MASKED else x * x
        variance = tl.sum(tl.sum(total, 2), 0) * (1.0 / K)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[None, :, None]
        image = ((row_in // tokens_per_image) * K)[None, :, None]

    product = tl.zeros([PARTS, PROJECTED, RANK_TILE], tl.float32)
    for start in range(0, SPAN, STEP):
        k = (k0 + start)[:, None, :]
        kt = (k0 + start)[None, :, :]
        x = tl.permute(_loaded(tl.permute(x_row, (1, 0, 2)) + kt, kt, K, MASKED), (1, 0, 2))
        if KIND == 1:
            scale = _loaded(scale_ptr + image + k, k, K, MASKED)
            x = (x - mean) * inverse * (1.0 + scale) + _loaded(shift_ptr + image + k, k, K, MASKED)
        elif KIND == 2:
            x = gelu(x)
        elif KIND == 3:
            x = silu(x)
        inside = (j < RANK)[:, None, None] & (kt < K)
        b = tl.load(folded_ptr + j[:, None, None] * K + kt, mask=inside, other=0.0)
        b = tl.permute(b, (1, 2, 0))
        x_high, x_low = tf32_parts(x)
        b_high, b_low = tf32_parts(b)
        product = tl.dot(x_high, b_low, product, input_precision="tf32")
        product = tl.dot(x_low, b_high, product, input_precision="tf32")
        product = tl.dot(x_high, b_high, product, input_precision="tf32")
    where = out_ptr + (row.to(tl.int64) * RANK)[:, None] + j[None, :]
    tl.store(where, tl.sum(product, 0), mask=(row < tokens_total)[:, None] & (j < RANK)[None, :])
