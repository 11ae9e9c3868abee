"""Prologue, rotation and per-token quantisation of the tokens, eq. (1), (4), and beside it the low-rank projection.

A token of K = L R values is seen as an L x R matrix, value k = l R + r; a tile holds several tokens side by side, [L,
tokens R]. Its rotation by ``H_L (x) H_R`` is ``H_L^T X (I (x) H_R)``: two small products on the tensor cores. For a
rotation by blocks, the same matrices have zeros between the blocks: ``I (x) H`` on either side. The matrices' entries
are +-1 and 0, exact in fp16; the activation is scaled to fp16's range by token and split into a high and a low fp16
part, 22 bits together, so that codes differ from the reference's only on the edges of cells. Blocks of 128 take no
matrix where a program has one token: seven rounds of sums and differences, in float32.

L is split into ``main`` and ``tail`` rows (72 = 64 + 8) since tiles are powers of two. Tokens of up to 16 columns take
one warp, which needs no barrier. The tile size depends on K alone, never on the number of tokens: every sum over a
token has one order.

The first programs of a launch project 32 tokens each (:mod:`robuq_core.kernels.triton.lowrank`), the others rotate. The
second axis of the grid is the layer of a group: one input, several layers.

One file, since it is one kernel with its launch: Triton needs each argument spelled out, which takes a third of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.ops import Modulation, Prologue, Quantized
from robuq_core.kernels.triton.config import LaunchConfig, launching, next_power_of_2
from robuq_core.kernels.triton.elementwise import gelu, silu
from robuq_core.kernels.triton.lowrank import PROJECTED_TOKENS, STEP, project, span
from robuq_core.kernels.triton.weights import Weights
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix

NO_PROLOGUE, MODULATE, GELU, SILU = range(4)
MAIN_ROWS, MIN_TILE, TILE_COLUMNS = 64, 16, 16
VALUES_PER_WARP, MAX_WARPS = 1536, 16


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
    """Tokens per program, and parts of a projection: up to 48 values per thread, where nothing spills."""
    shape = token_shape(width)
    tokens = max(1, TILE_COLUMNS // shape.columns)
    values = (shape.main_tile + shape.tail_tile) * tokens * shape.columns
    warps = min(MAX_WARPS, next_power_of_2(-(-values // VALUES_PER_WARP)))
    return LaunchConfig({"TOKENS": tokens, "PARTS": min(warps, 8)}, warps, 1)


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


def left_matrix(width: int, block: int | None) -> Tensor:
    """H_L transposed, fp16 ``[main_tile + tail_tile, same]``, zero where rows are padding."""
    shape = token_shape(width)
    matrix = _diagonal_blocks(shape.rows, block_orders(width, block)[0]).T
    size = shape.main_tile + shape.tail_tile
    kept = torch.cat([torch.arange(shape.main), shape.main_tile + torch.arange(shape.tail)])
    padded = torch.zeros(size, size, dtype=torch.float16)
    padded[kept[:, None], kept[None, :]] = matrix.half()
    return padded


def right_matrix(width: int, block: int | None) -> Tensor:
    """``I_tokens (x) H_R`` for the tokens of a program, fp16, square."""
    columns = default_config(width).blocks["TOKENS"] * token_shape(width).columns
    return _diagonal_blocks(columns, block_orders(width, block)[1]).half()


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
def _fp16_parts(x):  # type: ignore[no-untyped-def]
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _mix_rows(left, x, total):  # type: ignore[no-untyped-def]
    """``total + left x``."""
    high, low = _fp16_parts(x)
    return tl.dot(left, high, tl.dot(left, low, total))


@triton.jit
def _mix_columns(x, right, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x right``. ``EXACT``: fp16 holds x."""
    if EXACT:
        return tl.dot(x.to(tl.float16), right)
    else:
        high, low = _fp16_parts(x)
        return tl.dot(high, right, tl.dot(low, right))


@triton.jit
def _within_threads(x, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums and differences of values ``STRIDE`` apart in the last axis of ``[n, 16, 8]``."""
    n: tl.constexpr = x.shape[0]
    a, b = tl.split(tl.permute(tl.reshape(x, [n, 16, 4 // STRIDE, 2, STRIDE]), (0, 1, 2, 4, 3)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), [n, 16, 8])


@triton.jit
def _across_threads(x, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same in the middle axis, which lies in one warp: a gather is a shuffle."""
    at = tl.arange(0, 16)[None, :, None]
    other = tl.gather(x, tl.broadcast_to(at ^ STRIDE, x.shape), axis=1)
    return other + x * tl.where(at & STRIDE == 0, 1.0, -1.0)


@triton.jit
def _rotate_by_128(x):  # type: ignore[no-untyped-def]
    """Each 128 neighbours of ``x``, row by row, times ``H_128 / sqrt(128)``."""
    z = tl.reshape(x, [x.shape[0] * x.shape[1] // 128, 16, 8])
    for i in tl.static_range(3):
        z = _within_threads(z, 1 << i)
    for i in tl.static_range(4):
        z = _across_threads(z, 1 << i)
    return tl.reshape(z * 128**-0.5, x.shape)


@triton.jit
def _codes(z, inverse_step, top, real, MIDRISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as floats, 0 where there is no value."""
    v = z * inverse_step
    if MIDRISE:
        v = tl.minimum(tl.maximum(tl.floor(v) * 2.0 + 1.0, -top), top)
    else:
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        v = (tl.minimum(tl.maximum(v, -top - 1.0), top) + 12582912.0) - 12582912.0
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
    COLUMNS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MAIN_TILE: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    KIND: tl.constexpr,
    MIDRISE: tl.constexpr,
    PROJECTED: tl.constexpr,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    projections = tl.cdiv(tokens_total, PROJECTED) if RANK > 0 else 0
    tile = tl.program_id(0) - projections
    if tile < 0:
        if RANK > 0:
            project(
                x_ptr,
                shift_ptr,
                scale_ptr,
                folded_ptr + layer * (RANK * K),
                lowrank_ptr + layer * (RANK * tokens_total),
                tl.program_id(0),
                tokens_total,
                tokens_per_image,
                eps,
                K,
                RANK,
                RANK_TILE,
                KIND,
                PARTS,
                SPAN,
                PROJECTED,
                STEP,
            )
    else:
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
            z = _rotate_by_128(x)
            zt = _rotate_by_128(t) if TAIL > 0 else z
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
            x = _mix_columns(x * grow, right, EXACT)
            z = tl.zeros([MAIN_TILE, WIDTH], tl.float32)
            zt = z
            if TAIL > 0:
                t = tl.where(finite[None, :], t, 0.0)
                t = _mix_columns(t * grow, right, EXACT)
                at = MAIN_TILE + tail_row
                z = _mix_rows(tl.load(left_ptr + row[:, None] * SIZE + at[None, :]), t, z)
                zt = tl.zeros([TAIL_TILE, WIDTH], tl.float32)
                zt = _mix_rows(tl.load(left_ptr + at[:, None] * SIZE + at[None, :]), t, zt)
                zt = _mix_rows(tl.load(left_ptr + at[:, None] * SIZE + row[None, :]), x, zt) * shrink
            z = _mix_rows(tl.load(left_ptr + row[:, None] * SIZE + row[None, :]), x, z) * shrink

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


def constants(width: int, rank: int, kind: int, midrise: bool, block: int | None = None) -> dict[str, int | bool]:
    """The kernel's compile-time arguments for a layer, but for the launch shape. Bit widths share a kernel."""
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
        "RANK_TILE": max(MIN_TILE, next_power_of_2(rank)),
        "KIND": kind,
        "MIDRISE": midrise,
        "PROJECTED": PROJECTED_TOKENS,
        "STEP": STEP,
        "SPAN": span(width, default_config(width).blocks["PARTS"]),
    }


def rotate_quantize(x: Tensor, weights: Weights, prologue: Prologue) -> Quantized:
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.NarrowBackend`.

    Of a group of layers, every result has their number as its first dimension.
    """
    rows, width, rank = x.shape[0], weights.width, weights.rank
    lead = weights.lead
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
        bits, midrise = weights.bits, is_midrise(weights.bits, weights.grid)
        config = default_config(width)
        projections = triton.cdiv(rows, PROJECTED_TOKENS) if rank else 0
        grid = (projections + triton.cdiv(rows, config.blocks["TOKENS"]), *lead)
        with launching(x):
            rotate_quantize_kernel[grid](
                *(x, shift, scale, weights.signs, weights.left, weights.right, weights.folded),
                *(codes, sums, scales, lowrank, rows, per_image, eps),
                SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits],
                float(2**bits - 1 if midrise else 2 ** (bits - 1) - 1),
                **constants(width, rank, kind, midrise, weights.block),
                **config.options(),
            )
    return Quantized(codes, scales, lowrank, sums)
