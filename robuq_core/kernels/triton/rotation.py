"""How a token lies in tiles, and its rotation.

A token of K = L R values is seen as an L x R matrix, value k = l R + r; a tile holds several tokens side by side, [L,
tokens R]. Its rotation by ``H_L (x) H_R`` is ``H_L^T X (I (x) H_R)``: two small products on the tensor cores. For a
rotation by blocks, the same matrices have zeros between the blocks: ``I (x) H`` on either side. The matrices' entries
are +-1 and 0, exact in fp16; the activation is scaled to fp16's range by token and split into a high and a low fp16
part, 22 bits together, so that codes differ from the reference's only on the edges of cells. Blocks of 128 take no
matrix where a program has one token: seven rounds of sums and differences, in float32.

L is split into ``main`` and ``tail`` rows (72 = 64 + 8) since tiles are powers of two. Tokens of up to 16 columns take
one warp, which needs no barrier. The tile size depends on K alone, never on the number of tokens: every sum over a
token has one order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.triton.config import MIN_ROWS, LaunchConfig, power_of_2
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix

MAIN_ROWS, TILE_COLUMNS = 64, 16
VALUES_PER_WARP, MAX_WARPS = 1536, 16


def token_rows(width: int) -> int:
    """Rows of a token of ``width`` values.

    Raises:
        ValueError: the width has no Hadamard matrix.
    """
    rows, power = decompose_order(width)
    while rows < MAIN_ROWS and power > 1:
        rows, power = 2 * rows, power // 2
    return rows


@triton.constexpr_function
def main_rows(rows: int) -> int:
    """Those in the first tile of two, ``rows`` itself if there is one tile."""
    main = 1 << (rows.bit_length() - 1)
    tail = rows - main
    return rows if tail & (tail - 1) else main  # 28 = 16 + 8 + 4: one padded tile


def tile_rows(rows: int) -> tuple[int, int]:
    """Rows of both tiles with their padding, 0 of one that is not there."""
    main = main_rows(rows)
    return power_of_2(main, MIN_ROWS), power_of_2(rows - main, MIN_ROWS) if rows > main else 0


@lru_cache(maxsize=64)
def default_config(width: int) -> LaunchConfig:
    """Tokens per program, and parts of a projection: up to 48 values per thread, where nothing spills."""
    rows = token_rows(width)
    tokens = max(1, TILE_COLUMNS * rows // width)
    values = sum(tile_rows(rows)) * tokens * width // rows
    warps = min(MAX_WARPS, power_of_2(-(-values // VALUES_PER_WARP)))
    return LaunchConfig({"ROWS": rows, "TOKENS": tokens, "PARTS": min(warps, 8)}, warps, 1)


def rotation_matrices(width: int, block: int | None) -> tuple[Tensor, Tensor]:
    """What rotates a token's rows and its columns by ``H_left (x) H_right``, block by block, fp16, square.

    The first is transposed, as many rows as both tiles, zero where rows are padding; the second is
    ``I_tokens (x) H_right`` for the tokens of a program.

    Raises:
        ValueError: the block is neither the whole width nor a power of two that divides it.
    """
    rows, tokens = (default_config(width).blocks[name] for name in ("ROWS", "TOKENS"))
    left, right = rows, width // rows
    if block is not None and block != width:
        if block < 1 or width % block or block & (block - 1):
            raise ValueError(f"a rotation block must be a power of two that divides the width {width}, not {block}")
        right = min(block, right)
        left = block // right
    main, (main_tile, tail_tile) = main_rows(rows), tile_rows(rows)
    kept = torch.cat([torch.arange(main), main_tile + torch.arange(rows - main)])
    padded = torch.zeros(main_tile + tail_tile, main_tile + tail_tile, dtype=torch.float16)
    padded[kept[:, None], kept[None, :]] = _diagonal_blocks(rows, left).T
    return padded, _diagonal_blocks(tokens * width // rows, right)


def _diagonal_blocks(size: int, order: int) -> Tensor:
    """``I (x) H_order``, fp16 ``[size, size]``."""
    return torch.kron(torch.eye(size // order), hadamard_matrix(order).float()).half()


@triton.jit
def _fp16_parts(x):  # type: ignore[no-untyped-def]
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def mix_rows(left, x, total):  # type: ignore[no-untyped-def]
    """``total + left x``."""
    high, low = _fp16_parts(x)
    return tl.dot(left, high, tl.dot(left, low, total))


@triton.jit
def mix_columns(x, right, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
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
def rotate_by_128(x):  # type: ignore[no-untyped-def]
    """Each 128 neighbours of ``x``, row by row, times ``H_128 / sqrt(128)``."""
    z = tl.reshape(x, [x.shape[0] * x.shape[1] // 128, 16, 8])
    for i in tl.static_range(3):
        z = _within_threads(z, 1 << i)
    for i in tl.static_range(4):
        z = _across_threads(z, 1 << i)
    return tl.reshape(z * 128**-0.5, x.shape)
