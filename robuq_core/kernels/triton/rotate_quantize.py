"""Prologue, rotation, per-token quantisation and low-rank projection in one pass over the tokens, eq. (1), (2), (4).

A token of K = L R values is seen as an L x R matrix, value k = l R + r; a tile holds several tokens side by side, [L,
tokens R]. Its rotation by ``H_L (x) H_R`` is ``H_L^T X (I (x) H_R)``: two small products on the tensor cores. For a
rotation by blocks, the same matrices have zeros between the blocks: ``I (x) H`` on either side. The matrices' entries
are +-1 and 0, exact in fp16; the activation is scaled to fp16's range by token and split into a high and a low fp16
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
from robuq_core.kernels.triton.config import LaunchConfig, launching, next_power_of_2
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix

NO_PROLOGUE, MODULATE, GELU, SILU = range(4)
MAIN_ROWS, MIN_TILE, TILE_COLUMNS = 64, 16, 32


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
    """Tokens a program: 16 values a thread, where nothing spills."""
    shape = token_shape(width)
    tokens = max(1, TILE_COLUMNS // shape.columns)
    num_warps = 4 if shape.main_tile * tokens * shape.columns <= 2048 else 8
    return LaunchConfig({"TOKENS": tokens}, num_warps, 1)


def block_orders(width: int, block: int | None) -> tuple[int, int]:
    """Orders of the two Hadamard matrices of a token's rows and columns: ``H_left (x) H_right`` rotates one block.

    Raises:
        ValueError: the block is neither the whole width nor a power of two that divides it.
    """
    shape = token_shape(width)
    if block is None or block == width:
        return shape.rows, shape.columns
    right = min(block, shape.columns)
    if block < 1 or width % block or block & (block - 1):
        raise ValueError(f"a rotation block must be a power of two that divides the width {width}, not {block}")
    return block // right, right


def _diagonal_blocks(size: int, order: int) -> Tensor:
    """``I (x) H_order``, float32 ``[size, size]``."""
    return torch.kron(torch.eye(size // order), hadamard_matrix(order).float())


@lru_cache(maxsize=64)
def left_matrix(width: int, block: int | None, device: torch.device) -> Tensor:
    """H_L transposed, fp16 ``[main_tile + tail_tile, same]``, zero where rows are padding."""
    shape = token_shape(width)
    matrix = _diagonal_blocks(shape.rows, block_orders(width, block)[0]).T
    size = shape.main_tile + shape.tail_tile
    kept = torch.cat([torch.arange(shape.main), shape.main_tile + torch.arange(shape.tail)])
    padded = torch.zeros(size, size, dtype=torch.float16)
    padded[kept[:, None], kept[None, :]] = matrix.half()
    return padded.to(device)


@lru_cache(maxsize=64)
def right_matrix(width: int, block: int | None, tokens: int, device: torch.device) -> Tensor:
    """``I_tokens (x) H_R``, fp16, square."""
    matrix = _diagonal_blocks(tokens * token_shape(width).columns, block_orders(width, block)[1])
    return matrix.half().to(device)


@triton.jit
def _prologue(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))
    elif KIND == 3:
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _sum_by_token(total, column, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of columns ``[columns]`` added up over each token, in every column of the token.

    Columns exchange partial sums: a reshape to tokens and back would end in a layout that spills the whole tile.
    """
    for i in tl.static_range(10):
        if (1 << i) < COLUMNS:
            total += tl.gather(total, column ^ (1 << i), axis=0)
    return total


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    """``|x|``, infinite where x is NaN: a maximum may pass over NaN."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def _max_by_token(largest, column, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    for i in tl.static_range(10):
        if (1 << i) < COLUMNS:
            largest = tl.maximum(largest, tl.gather(largest, column ^ (1 << i), axis=0))
    return largest


@triton.jit
def _fp16_parts(x):  # type: ignore[no-untyped-def]
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _mix_rows(left, x, total):  # type: ignore[no-untyped-def]
    """``total + left x``."""
    high, low = _fp16_parts(x)
    return tl.dot(left, high, tl.dot(left, low, total))


@triton.jit
def _mix_columns(x, right):  # type: ignore[no-untyped-def]
    """``x right``."""
    high, low = _fp16_parts(x)
    return tl.dot(high, right, tl.dot(low, right))


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
    right_ptr,
    lowrank_b_ptr,
    codes_ptr,
    scales_ptr,
    lowrank_ptr,
    tokens_total,
    tokens_per_image,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MAIN_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
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
    live = token < tokens_total
    # One 64-bit base for the program, 32-bit offsets within it.
    start = tl.program_id(0).to(tl.int64) * (TOKENS * K)
    x_ptr += start
    codes_ptr += start
    base = (column // COLUMNS) * K

    row = tl.arange(0, MAIN_TILE)
    k = row[:, None] * COLUMNS + (column % COLUMNS)[None, :]
    real = (row < MAIN)[:, None] if MAIN < MAIN_TILE else (row >= 0)[:, None]
    here = real & live[None, :]
    x = _prologue(tl.load(x_ptr + base[None, :] + k, mask=here, other=0.0).to(tl.float32), KIND)
    if TAIL > 0:
        tail_row = tl.arange(0, TAIL_TILE)
        tail_k = (MAIN + tail_row)[:, None] * COLUMNS + (column % COLUMNS)[None, :]
        tail_real = (tail_row < TAIL)[:, None]
        tail_here = tail_real & live[None, :]
        t = _prologue(tl.load(x_ptr + base[None, :] + tail_k, mask=tail_here, other=0.0).to(tl.float32), KIND)

    if KIND == 1:
        total = tl.sum(x, 0)
        if TAIL > 0:
            total += tl.sum(t, 0)
        mean = (_sum_by_token(total, column, COLUMNS) * (1.0 / K))[None, :]
        x = tl.where(here, x - mean, 0.0)
        total = tl.sum(x * x, 0)
        if TAIL > 0:
            t = tl.where(tail_here, t - mean, 0.0)
            total += tl.sum(t * t, 0)
        variance = _sum_by_token(total, column, COLUMNS) * (1.0 / K)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[None, :]
        image = (token // tokens_per_image) * K
        scale = tl.load(scale_ptr + image[None, :] + k, mask=here, other=0.0)
        x = x * inverse * (1.0 + scale) + tl.load(shift_ptr + image[None, :] + k, mask=here, other=0.0)
        if TAIL > 0:
            scale = tl.load(scale_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
            shift = tl.load(shift_ptr + image[None, :] + tail_k, mask=tail_here, other=0.0)
            t = t * inverse * (1.0 + scale) + shift

    # To fp16's range: after the first product |x| COLUMNS <= 2^14. A token that is not finite becomes zeros here, since
    # zero times NaN would reach its neighbours in the product, and NaN again after it.
    largest = tl.max(_magnitude(x), 0)
    if TAIL > 0:
        largest = tl.maximum(largest, tl.max(_magnitude(t), 0))
    largest = tl.maximum(_max_by_token(largest, column, COLUMNS), 1e-30)
    finite = largest < float("inf")
    grow = tl.div_rn(16384.0 / COLUMNS, largest)[None, :]
    shrink = tl.where(finite, largest * (COLUMNS / 16384.0 / (BLOCK**0.5)), float("nan"))[None, :]
    x = tl.where(finite[None, :], x, 0.0)
    right = tl.load(right_ptr + column[:, None] * WIDTH + column[None, :])
    x = _mix_columns(x * grow * tl.load(signs_ptr + k, mask=real, other=0.0), right)
    z = tl.zeros([MAIN_TILE, WIDTH], tl.float32)
    if TAIL > 0:
        t = tl.where(finite[None, :], t, 0.0)
        t = _mix_columns(t * grow * tl.load(signs_ptr + tail_k, mask=tail_real, other=0.0), right)
        at = MAIN_TILE + tail_row
        z = _mix_rows(tl.load(left_ptr + row[:, None] * SIZE + at[None, :]), t, z)
        zt = tl.zeros([TAIL_TILE, WIDTH], tl.float32)
        zt = _mix_rows(tl.load(left_ptr + at[:, None] * SIZE + at[None, :]), t, zt)
        zt = _mix_rows(tl.load(left_ptr + at[:, None] * SIZE + row[None, :]), x, zt) * shrink
    z = _mix_rows(tl.load(left_ptr + row[:, None] * SIZE + row[None, :]), x, z) * shrink

    total = tl.sum(tl.abs(z), 0)
    if TAIL > 0:
        total += tl.sum(tl.abs(zt), 0)
    step = _sum_by_token(total, column, COLUMNS) * (1.0 / K) * STEP
    inverse_step = tl.div_rn(1.0, tl.maximum(step, 1e-30))[None, :]
    tl.store(codes_ptr + base[None, :] + k, _codes(z, inverse_step, MIDRISE, TOP), mask=here)
    if TAIL > 0:
        tl.store(codes_ptr + base[None, :] + tail_k, _codes(zt, inverse_step, MIDRISE, TOP), mask=tail_here)
    tl.store(scales_ptr + token, step * (0.5 if MIDRISE else 1.0), mask=live & (column % COLUMNS == 0))

    if RANK > 0:
        rank = tl.arange(0, RANK_TILE)
        sums = tl.zeros([RANK_TILE, WIDTH], tl.float32)
        for j in range(RANK):
            total = tl.sum(z * tl.load(lowrank_b_ptr + j * K + k, mask=real, other=0.0), 0)
            if TAIL > 0:
                total += tl.sum(zt * tl.load(lowrank_b_ptr + j * K + tail_k, mask=tail_real, other=0.0), 0)
            sums = tl.where(rank[:, None] == j, total[None, :], sums)
        projected = tl.sum(tl.reshape(sums, [RANK_TILE, TOKENS, COLUMNS]), 2)
        own = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        inside = (rank < RANK)[:, None] & (own < tokens_total)[None, :]
        tl.store(lowrank_ptr + own[None, :] * RANK + rank[:, None], projected, mask=inside)


def constants(
    width: int, rank: int, kind: int, bits: int, midrise: bool, block: int | None = None
) -> dict[str, int | float | bool]:
    """The kernel's compile-time arguments for a layer, but for the launch shape."""
    shape = token_shape(width)
    return {
        "K": width,
        "BLOCK": width if block is None else block,
        "COLUMNS": shape.columns,
        "MAIN": shape.main,
        "TAIL": shape.tail,
        "MAIN_TILE": shape.main_tile,
        "TAIL_TILE": shape.tail_tile,
        "RANK": rank,
        "RANK_TILE": next_power_of_2(rank),
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
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.NarrowBackend`."""
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
        midrise, block = is_midrise(layer.bits, layer.grid), layer.rotation_block
        tokens = config.blocks["TOKENS"]
        grid = (triton.cdiv(rows, tokens),)
        with launching(x):
            rotate_quantize_kernel[grid](
                *(x, shift, scale, layer.signs),
                *(left_matrix(width, block, x.device), right_matrix(width, block, tokens, x.device)),
                *(layer.lowrank_b, codes, scales, lowrank, rows, per_image, eps),
                **constants(width, rank, kind, layer.bits, midrise, block),
                **config.options(),
            )
    return Quantized(codes, scales, lowrank)
