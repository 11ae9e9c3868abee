"""Prologue, rotation, per-token quantisation and low-rank projection in one pass over the tokens, eq. (1), (2), (4).

A token of K = L R values is seen as an L x R matrix, value k = l R + r, and its rotation ``H_L (x) H_R`` as two steps.
H_R is a power of two: butterflies between lanes. H_L = H_base (x) H_2^i is a matrix product on the tensor cores. Its
entries are +-1, exact in fp16; the activation is scaled to fp16's range by token and split into a high and a low fp16
part, 22 bits together, so that codes differ from the reference's only on the edges of cells.

L is split into ``main`` and ``tail`` rows (72 = 64 + 8) since tiles are powers of two. The tile size depends on K
alone, never on the number of tokens: every sum over a token has one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.triton.config import LaunchConfig, next_power_of_2, on_device_of
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix

NO_PROLOGUE, MODULATE, GELU, SILU = range(4)
MAIN_ROWS, MIN_TILE, TILE_COLUMNS = 64, 16, 64


@dataclass(frozen=True)
class TokenShape:
    """K = ``rows`` x ``columns``; ``main`` of the rows and ``tail`` of them, each in a tile of ``*_tile`` rows."""

    rows: int
    columns: int
    main: int
    tail: int
    main_tile: int
    tail_tile: int


@lru_cache(maxsize=64)
def token_shape(width: int) -> TokenShape:
    """The split of a token of ``width`` values.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    base, power = decompose_order(width)
    rows = base
    while rows * 2 < 2 * MAIN_ROWS and rows < base * power:
        rows *= 2
    columns = width // rows
    main = 1 << (rows.bit_length() - 1)
    tail = rows - main
    if tail & (tail - 1):  # 28 = 16 + 8 + 4: one padded tile instead
        main, tail = rows, 0
    main_tile = max(MIN_TILE, next_power_of_2(main))
    tail_tile = max(MIN_TILE, tail) if tail else 0
    return TokenShape(rows, columns, main, tail, main_tile, tail_tile)


def default_config(width: int) -> LaunchConfig:
    """Tokens a program: about 32 values a thread, where nothing spills."""
    shape = token_shape(width)
    tokens = max(1, TILE_COLUMNS // shape.columns)
    num_warps = 4 if shape.main_tile * tokens * shape.columns <= 4096 else 8
    return LaunchConfig({"TOKENS": tokens}, num_warps, 1)


@lru_cache(maxsize=64)
def left_matrix(width: int, device: torch.device) -> Tensor:
    """H_L transposed, fp16 ``[main_tile + tail_tile, same]``, zero where rows are padding."""
    shape = token_shape(width)
    matrix = hadamard_matrix(shape.rows).T
    size = shape.main_tile + shape.tail_tile
    kept = torch.cat([torch.arange(shape.main), shape.main_tile + torch.arange(shape.tail)])
    padded = torch.zeros(size, size, dtype=torch.float16)
    padded[kept[:, None], kept[None, :]] = matrix.half()
    return padded.to(device)


@triton.jit
def _prologue(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))
    elif KIND == 3:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _by_token(x, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of ``[rows, TOKENS * COLUMNS]`` over each token -> ``[TOKENS]``."""
    return tl.sum(tl.reshape(tl.sum(x, 0), [TOKENS, COLUMNS]), 1)


@triton.jit
def _max_by_token(x, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.max(tl.reshape(tl.max(tl.abs(x), 0), [TOKENS, COLUMNS]), 1)


@triton.jit
def _spread(value, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[TOKENS]`` -> ``[1, TOKENS * COLUMNS]``."""
    return tl.reshape(tl.broadcast_to(value[:, None], [TOKENS, COLUMNS]), [1, TOKENS * COLUMNS])


@triton.jit
def _butterflies(x, column, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sylvester's matrix over the column index within a token."""
    index = tl.broadcast_to(column[None, :], x.shape)
    for i in tl.static_range(10):
        if (1 << i) < COLUMNS:
            other = tl.gather(x, index ^ (1 << i), axis=1)
            x = other + tl.where((index & (1 << i)) == 0, x, -x)
    return x


@triton.jit
def _mix(left, x, total):  # type: ignore[no-untyped-def]
    """``total + left x`` with x in two fp16 parts."""
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.dot(left, high, tl.dot(left, low, total))


@triton.jit
def _codes(z, inverse_step, MIDRISE: tl.constexpr, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    v = z * inverse_step
    if MIDRISE:
        v = tl.minimum(tl.maximum(tl.floor(v) * 2.0 + 1.0, -TOP), TOP)
    else:
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        v = (tl.minimum(tl.maximum(v, -TOP - 1.0), TOP) + 12582912.0) - 12582912.0
    return v.to(tl.int8)


@triton.jit
def rotate_quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    left_ptr,
    lowrank_b_ptr,
    codes_ptr,
    scales_ptr,
    lowrank_ptr,
    tokens_total,
    tokens_per_image,
    eps,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MAIN_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    STEP: tl.constexpr,
    MIDRISE: tl.constexpr,
    TOP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    SIZE: tl.constexpr = MAIN_TILE + TAIL_TILE
    WIDTH: tl.constexpr = TOKENS * COLUMNS
    column = tl.arange(0, WIDTH)
    token = tl.program_id(0) * TOKENS + column // COLUMNS
    base = token.to(tl.int64) * K
    live = token < tokens_total

    row = tl.arange(0, MAIN_TILE)
    k = row[:, None] * COLUMNS + (column % COLUMNS)[None, :]
    here = (row < MAIN)[:, None] & live[None, :]
    x = _prologue(tl.load(x_ptr + base[None, :] + k, mask=here, other=0.0).to(tl.float32), KIND)
    if TAIL > 0:
        tail_row = tl.arange(0, TAIL_TILE)
        tail_k = (MAIN + tail_row)[:, None] * COLUMNS + (column % COLUMNS)[None, :]
        tail_here = (tail_row < TAIL)[:, None] & live[None, :]
        t = _prologue(tl.load(x_ptr + base[None, :] + tail_k, mask=tail_here, other=0.0).to(tl.float32), KIND)

    if KIND == 1:
        total = _by_token(x, TOKENS, COLUMNS)
        if TAIL > 0:
            total += _by_token(t, TOKENS, COLUMNS)
        mean = _spread(total * (1.0 / K), TOKENS, COLUMNS)
        x = tl.where(here, x - mean, 0.0)
        total = _by_token(x * x, TOKENS, COLUMNS)
        if TAIL > 0:
            t = tl.where(tail_here, t - mean, 0.0)
            total += _by_token(t * t, TOKENS, COLUMNS)
        deviation = tl.sqrt_rn(total * (1.0 / K) + eps)
        inverse = _spread(tl.div_rn(1.0, deviation), TOKENS, COLUMNS)
        # The compiler cannot see that all columns of a token share its image, and would load value by value.
        image = tl.max_constancy((token // tokens_per_image) * K, COLUMNS)
        scale = tl.load(scale_ptr + image[None, :] + k, mask=here, other=0.0)
        x = x * inverse * (1.0 + scale) + tl.load(shift_ptr + image[None, :] + k, mask=here, other=0.0)
        if TAIL > 0:
            scale = tl.load(scale_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
            shift = tl.load(shift_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
            t = t * inverse * (1.0 + scale) + shift

    # To fp16's range: |x| COLUMNS <= 2^14 after the butterflies.
    largest = _max_by_token(x, TOKENS, COLUMNS)
    if TAIL > 0:
        largest = tl.maximum(largest, _max_by_token(t, TOKENS, COLUMNS))
    largest = tl.maximum(largest, 1e-30)
    grow = _spread(tl.div_rn(16384.0 / COLUMNS, largest), TOKENS, COLUMNS)
    shrink = _spread(largest * (COLUMNS / 16384.0 / (K**0.5)), TOKENS, COLUMNS)
    x = _butterflies(x * grow * tl.load(signs_ptr + k, mask=(row < MAIN)[:, None], other=0.0), column, COLUMNS)
    z = tl.zeros([MAIN_TILE, WIDTH], tl.float32)
    if TAIL > 0:
        signs = tl.load(signs_ptr + tail_k, mask=(tail_row < TAIL)[:, None], other=0.0)
        t = _butterflies(t * grow * signs, column, COLUMNS)
        at = MAIN_TILE + tail_row
        z = _mix(tl.load(left_ptr + row[:, None] * SIZE + at[None, :]), t, z)
        zt = _mix(tl.load(left_ptr + at[:, None] * SIZE + at[None, :]), t, tl.zeros([TAIL_TILE, WIDTH], tl.float32))
        zt = _mix(tl.load(left_ptr + at[:, None] * SIZE + row[None, :]), x, zt) * shrink
    z = _mix(tl.load(left_ptr + row[:, None] * SIZE + row[None, :]), x, z) * shrink

    total = _by_token(tl.abs(z), TOKENS, COLUMNS)
    if TAIL > 0:
        total += _by_token(tl.abs(zt), TOKENS, COLUMNS)
    step = total * (1.0 / K) * STEP
    inverse_step = _spread(tl.div_rn(1.0, tl.maximum(step, 1e-30)), TOKENS, COLUMNS)
    tl.store(codes_ptr + base[None, :] + k, _codes(z, inverse_step, MIDRISE, TOP), mask=here)
    if TAIL > 0:
        tl.store(codes_ptr + base[None, :] + tail_k, _codes(zt, inverse_step, MIDRISE, TOP), mask=tail_here)
    own = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tl.store(scales_ptr + own, step * (0.5 if MIDRISE else 1.0), mask=own < tokens_total)

    for j in range(RANK):
        factor = tl.load(lowrank_b_ptr + j * K + k, mask=(row < MAIN)[:, None], other=0.0)
        projected = _by_token(z * factor, TOKENS, COLUMNS)
        if TAIL > 0:
            factor = tl.load(lowrank_b_ptr + j * K + tail_k, mask=(tail_row < TAIL)[:, None], other=0.0)
            projected += _by_token(zt * factor, TOKENS, COLUMNS)
        tl.store(lowrank_ptr + own.to(tl.int64) * RANK + j, projected, mask=own < tokens_total)


def constants(width: int, rank: int, kind: int, bits: int, midrise: bool) -> dict[str, int | float | bool]:
    """The kernel's compile-time arguments for a layer, but for the launch shape."""
    shape = token_shape(width)
    return {
        "K": width,
        "COLUMNS": shape.columns,
        "MAIN": shape.main,
        "TAIL": shape.tail,
        "MAIN_TILE": shape.main_tile,
        "TAIL_TILE": shape.tail_tile,
        "RANK": rank,
        "KIND": kind,
        "STEP": SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits],
        "MIDRISE": midrise,
        "TOP": 2**bits - 1 if midrise else 2 ** (bits - 1) - 1,
    }


def candidate_configs(width: int) -> list[LaunchConfig]:
    """What tuning tries for a token of ``width`` values."""
    tokens = default_config(width).blocks["TOKENS"]
    choices = sorted({max(1, tokens // 2), tokens, tokens * 2})
    return [LaunchConfig({"TOKENS": n}, warps, 1) for n in choices for warps in (4, 8)]


def rotate_quantize(x: Tensor, layer: TernaryLayer, prologue: Prologue, config: LaunchConfig) -> Quantized:
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.Backend`."""
    rows, width, rank = x.shape[0], layer.in_features, layer.rank
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales, lowrank = (torch.empty(shape, device=x.device) for shape in ((rows,), (rows, rank)))
    kind, shift, scale, per_image, eps = NO_PROLOGUE, x, x, 1, 0.0
    if isinstance(prologue, Modulation):
        shift, scale, eps = prologue.shift, prologue.scale, prologue.eps
        kind, per_image = MODULATE, max(1, rows // shift.shape[0])
    elif prologue is not None:
        kind = GELU if prologue == "gelu" else SILU
    if rows:
        midrise = is_midrise(layer.bits, layer.grid)
        grid = (triton.cdiv(rows, config.blocks["TOKENS"]),)
        with on_device_of(x):
            rotate_quantize_kernel[grid](
                *(x, shift, scale, layer.signs, left_matrix(width, x.device), layer.lowrank_b, codes, scales, lowrank),
                *(rows, per_image, eps),
                **constants(width, rank, kind, layer.bits, midrise),
                **config.options(),
            )
    return Quantized(codes, scales, lowrank)
