"""Eight-bit attention as :mod:`robuq_core.quant.attention` defines it: exact products on the tensor cores.

On 9.0 and up to 256 tokens, one kernel takes a block of queries of a head against all its keys at once, and quantises
what it reads in registers. A head of 72 values is 64 and 8 of them there, not 128. Otherwise, a first kernel finds
scales and codes of Q and K (by token) and V (by head) and lays them out by head, padded with zeros. The second one goes
over the keys twice: first for a row's largest logit, then for the codes of its exponentials times the codes of V.

Every product multiplies int8 into int32. Codes of exponentials, 0..255, enter less 128, which fits int8; 128 times the
sums of V's codes puts it back. Integers: exact in any order.

Tiles depend on the head alone, so an image's result does not depend on the images beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.triton.config import (
    MIN_DEPTH,
    MIN_ROWS,
    LaunchConfig,
    fence_copies,
    launching,
    power_of_2,
    rounded,
)

# 255 * 127 * 65536 < 2^31.
MAX_HEAD_DIM, MAX_LENGTH = 256, 2**16
# What one kernel takes: its logits lie in registers.
SHORT_LENGTH, SHORT_HEAD_DIM = 256, 128
LEAST_DEPTH, LEAST_ROWS = tl.constexpr(MIN_DEPTH), tl.constexpr(MIN_ROWS)


def is_short(head_dim: int, length: int, architecture: int) -> bool:
    """Whether one kernel runs the attention: on 9.0, since its codes move between ``mma.sync``'s layouts by way of
    more registers than there are."""
    return architecture == 90 and length <= SHORT_LENGTH and head_dim <= SHORT_HEAD_DIM


@triton.constexpr_function
def main_part(head_dim: int) -> int:
    """Values of a head in its first tile, 72 or 64 of 64 + 8: a tile is a power of two of 32 or more."""
    main = 1 << (head_dim.bit_length() - 1)
    return main if main >= 64 and 0 < head_dim - main <= MIN_DEPTH else head_dim


def short_config(length: int) -> LaunchConfig:
    """Of :func:`short_attention_kernel`: queries per program."""
    return LaunchConfig({"BLOCK_M": 64 if length > 32 else 32}, 8 if length > 128 else 4, 1)


def default_config(head_dim: int) -> LaunchConfig:
    """Of :func:`attention_kernel`: queries and keys per tile."""
    wide = head_dim > 128
    return LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32 if wide else 64}, 8 if wide else 4, 2)


def quantize_config(head_dim: int) -> LaunchConfig:
    """Of :func:`quantize_heads_kernel`: tokens per program, each of which reads all of its head's V."""
    return LaunchConfig({"BLOCK": 64 if head_dim <= 128 else 32}, 8, 1)


@triton.jit
def _scaled(largest):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.div_rn(largest, 127.0), 1e-30)


@triton.jit
def _quantized(x, scale):  # type: ignore[no-untyped-def]
    return rounded(tl.div_rn(x, scale)).to(tl.int8)


@triton.jit
def _codes_by_token(x):  # type: ignore[no-untyped-def]
    scale = _scaled(tl.max(tl.abs(x), 1))
    return _quantized(x, scale[:, None]), scale


@triton.jit(do_not_specialize=["padded", "heads"])
def quantize_heads_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_scales_ptr,
    k_scales_ptr,
    v_scales_ptr,
    v_sums_ptr,
    padded,
    heads,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens of one head of one image. ``padded``: tokens of the padded layout."""
    HEAD_TILE: tl.constexpr = power_of_2(HEAD, LEAST_DEPTH)
    head = tl.program_id(0).to(tl.int64)
    stride = 3 * heads * HEAD
    qkv_ptr += (head // heads) * LENGTH * stride + (head % heads) * HEAD
    v_in_ptr = qkv_ptr + 2 * heads * HEAD
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HEAD_TILE)
    real = (token < LENGTH)[:, None] & (column < HEAD)[None, :]
    here = token[:, None].to(tl.int64) * stride + column[None, :]
    out = head * padded * HEAD_TILE + token[:, None] * HEAD_TILE + column[None, :]

    codes, scale = _codes_by_token(tl.load(qkv_ptr + here, mask=real, other=0.0).to(tl.float32))
    tl.store(q_ptr + out, codes)
    tl.store(q_scales_ptr + head * padded + token, scale * (HEAD**-0.5))
    codes, scale = _codes_by_token(tl.load(qkv_ptr + heads * HEAD + here, mask=real, other=0.0).to(tl.float32))
    tl.store(k_ptr + out, codes)
    tl.store(k_scales_ptr + head * padded + token, scale)

    # Every block of a head finds the head's largest value for itself: a maximum has no order.
    largest = tl.zeros([BLOCK, HEAD_TILE], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = (t < LENGTH)[:, None] & (column < HEAD)[None, :]
        v = tl.load(v_in_ptr + t[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(v.to(tl.float32)))
    v_scale = _scaled(tl.max(tl.max(largest, 1), 0))
    codes = _quantized(tl.load(v_in_ptr + here, mask=real, other=0.0).to(tl.float32), v_scale)
    tl.store(v_ptr + out, codes)
    sums = (head * (padded // BLOCK) + tl.program_id(1)) * HEAD_TILE
    tl.store(v_sums_ptr + sums + column, tl.sum(codes.to(tl.int32), 0))
    if tl.program_id(1) == 0:
        tl.store(v_scales_ptr + head, v_scale)


@triton.jit
def _logits(q, q_scale, k_ptr, k_scales_ptr, key, column, LENGTH: tl.constexpr, HEAD_TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits of a tile, float32; minus infinity where there is no key."""
    k = tl.load(k_ptr + key[None, :] * HEAD_TILE + column[:, None])
    k_scale = tl.load(k_scales_ptr + key)
    fence_copies()
    logits = tl.dot(q, k).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
    return tl.where((key < LENGTH)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["padded", "heads", "blocks"])
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    q_scales_ptr,
    k_scales_ptr,
    v_scales_ptr,
    v_sums_ptr,
    out_ptr,
    padded,
    heads,
    blocks,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head of one image against all its keys. ``blocks``: of the sums of V's codes."""
    HEAD_TILE: tl.constexpr = power_of_2(HEAD, LEAST_DEPTH)
    head = tl.program_id(0).to(tl.int64)
    codes = head * padded * HEAD_TILE
    k_ptr += codes
    v_ptr += codes
    k_scales_ptr += head * padded
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, HEAD_TILE)
    q = tl.load(q_ptr + codes + query[:, None] * HEAD_TILE + column[None, :])
    q_scale = tl.load(q_scales_ptr + head * padded + query)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, LENGTH, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        logits = _logits(q, q_scale, k_ptr, k_scales_ptr, key, column, LENGTH, HEAD_TILE)
        largest = tl.maximum(largest, tl.max(logits, 1))

    total = tl.zeros([BLOCK_M], tl.int32)
    product = tl.zeros([BLOCK_M, HEAD_TILE], tl.int32)
    for start in range(0, LENGTH, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        logits = _logits(q, q_scale, k_ptr, k_scales_ptr, key, column, LENGTH, HEAD_TILE)
        # Contracted to one rounding less than in the first loop, a difference may be above 0.
        p = rounded(tl.exp(tl.minimum(logits - largest[:, None], 0.0)) * 255.0).to(tl.int32)
        total += tl.sum(p, 1)
        v = tl.load(v_ptr + key[:, None] * HEAD_TILE + column[None, :])
        fence_copies()
        product = tl.dot((p - 128).to(tl.int8), v, product, out_dtype=tl.int32)

    v_sum = tl.zeros([HEAD_TILE], tl.int32)
    v_sums_ptr += head * blocks * HEAD_TILE
    for start in range(0, blocks, 16):
        block = start + tl.arange(0, 16)
        here = block[:, None] * HEAD_TILE + column[None, :]
        v_sum += tl.sum(tl.load(v_sums_ptr + here, mask=(block < blocks)[:, None], other=0), 0)
    product += 128 * v_sum[None, :]

    factor = tl.div_rn(tl.load(v_scales_ptr + head), total.to(tl.float32))
    width = heads * HEAD
    out_ptr += (head // heads) * LENGTH * width + (head % heads) * HEAD
    real = (query < LENGTH)[:, None] & (column < HEAD)[None, :]
    out = (product.to(tl.float32) * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query[:, None] * width + column[None, :], out, mask=real)


@triton.jit
def _values(ptr, token, stride, first, WIDTH: tl.constexpr, LENGTH: tl.constexpr, LEAST: tl.constexpr = LEAST_DEPTH):  # type: ignore[no-untyped-def]
    """Values ``first .. first + WIDTH`` of the tokens' heads, zeros around them."""
    column = tl.arange(0, power_of_2(WIDTH, LEAST))
    real = (token < LENGTH)[:, None] & (column < WIDTH)[None, :]
    here = token[:, None] * stride + (first + column)[None, :]
    return tl.load(ptr + here, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _largest_by_token(pointer, token, stride, HEAD: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    MAIN: tl.constexpr = main_part(HEAD)
    largest = tl.max(tl.abs(_values(pointer, token, stride, 0, MAIN, LENGTH)), 1)
    if MAIN < HEAD:
        largest = tl.maximum(largest, tl.max(tl.abs(_values(pointer, token, stride, MAIN, HEAD - MAIN, LENGTH)), 1))
    return largest


@triton.jit
def _store_heads(p_codes, v_codes, factor, out_ptr, query, width, first, WIDTH: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Outputs ``first .. first + WIDTH`` of the queries. ``v_codes``: as floats, whose sums are exact."""
    v_sums = tl.sum(v_codes, 0).to(tl.int32)
    product = tl.dot(p_codes, v_codes.to(tl.int8), out_dtype=tl.int32) + 128 * v_sums[None, :]
    column = tl.arange(0, v_codes.shape[1])
    real = (query < LENGTH)[:, None] & (column < WIDTH)[None, :]
    here = out_ptr + query[:, None] * width + (first + column)[None, :]
    tl.store(here, (product.to(tl.float32) * factor).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["heads"])
def short_attention_kernel(qkv_ptr, out_ptr, heads, LENGTH: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of queries of one head of one image against all its keys, up to 256 tokens."""
    MAIN: tl.constexpr = main_part(HEAD)
    head = tl.program_id(0).to(tl.int64)
    width = heads * HEAD
    stride = 3 * width
    qkv_ptr += (head // heads) * LENGTH * stride + (head % heads) * HEAD
    k_ptr = qkv_ptr + width
    v_ptr = k_ptr + width
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.arange(0, power_of_2(LENGTH, LEAST_DEPTH))

    # Values are read again after their largest one is known: kept till then, they would not fit into the registers.
    q_scale = _scaled(_largest_by_token(qkv_ptr, query, stride, HEAD, LENGTH))[:, None]
    k_scale = _scaled(_largest_by_token(k_ptr, key, stride, HEAD, LENGTH))[:, None]
    tl.debug_barrier()
    q = _quantized(_values(qkv_ptr, query, stride, 0, MAIN, LENGTH), q_scale)
    k = _quantized(_values(k_ptr, key, stride, 0, MAIN, LENGTH), k_scale)
    logits = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    if MAIN < HEAD:
        tl.debug_barrier()
        q = _quantized(_values(qkv_ptr, query, stride, MAIN, HEAD - MAIN, LENGTH), q_scale)
        k = _quantized(_values(k_ptr, key, stride, MAIN, HEAD - MAIN, LENGTH), k_scale)
        logits = tl.dot(q, tl.trans(k), logits, out_dtype=tl.int32)
    x = logits.to(tl.float32) * (q_scale * (HEAD**-0.5)) * tl.trans(k_scale)
    x = tl.where((key < LENGTH)[None, :], x, float("-inf"))
    p = rounded(tl.exp(tl.minimum(x - tl.max(x, 1)[:, None], 0.0)) * 255.0)
    total = tl.sum(p.to(tl.int32), 1)
    p_codes = (p - 128.0).to(tl.int8)

    tl.debug_barrier()  # or the compiler reads V before all that, and spills
    largest = tl.max(_largest_by_token(v_ptr, key, stride, HEAD, LENGTH), 0)
    v_scale = _scaled(largest)
    factor = tl.div_rn(v_scale, total.to(tl.float32))[:, None]
    out_ptr += (head // heads) * LENGTH * width + (head % heads) * HEAD
    tl.debug_barrier()
    v = rounded(tl.div_rn(_values(v_ptr, key, stride, 0, MAIN, LENGTH), v_scale))
    _store_heads(p_codes, v, factor, out_ptr, query, width, 0, MAIN, LENGTH)
    if MAIN < HEAD:
        v = rounded(tl.div_rn(_values(v_ptr, key, stride, MAIN, HEAD - MAIN, LENGTH, LEAST_ROWS), v_scale))
        _store_heads(p_codes, v, factor, out_ptr, query, width, MAIN, HEAD - MAIN, LENGTH)


def attention(qkv: Tensor, num_heads: int, architecture: int) -> Tensor:
    """Launch the kernels on contiguous ``qkv [B, L, 3 D]``, float32 or bfloat16 -> ``[B, L, D]`` of the same dtype.

    Raises:
        ValueError: heads of more than 256 values, or more than 2^16 tokens: the products would not be exact.
    """
    images, length, triple = qkv.shape
    head_dim = triple // 3 // num_heads
    if head_dim > MAX_HEAD_DIM or length > MAX_LENGTH:
        raise ValueError(
            f"attention takes head_dim up to {MAX_HEAD_DIM} and {MAX_LENGTH} tokens, not {head_dim} and {length}"
        )
    out, heads = torch.empty(images, length, triple // 3, dtype=qkv.dtype, device=qkv.device), images * num_heads
    if not out.numel():
        return out
    if is_short(head_dim, length, architecture):
        short = short_config(length)
        with launching(qkv):
            grid = heads, triton.cdiv(length, short.blocks["BLOCK_M"])
            short_attention_kernel[grid](qkv, out, num_heads, length, head_dim, **short.options())
        return out
    first, config = quantize_config(head_dim), default_config(head_dim)
    block, block_m = first.blocks["BLOCK"], config.blocks["BLOCK_M"]
    padded = -(-length // 64) * 64  # a multiple of every tile's side
    blocks, tile, device = padded // block, power_of_2(head_dim, MIN_DEPTH), qkv.device
    q, k, v = (torch.empty(heads, padded, tile, dtype=torch.int8, device=device) for _ in range(3))
    q_scales, k_scales = (torch.empty(heads, padded, device=device) for _ in range(2))
    v_scales = torch.empty(heads, device=device)
    v_sums = torch.empty(heads, blocks, tile, dtype=torch.int32, device=device)
    operands = (q, k, v, q_scales, k_scales, v_scales, v_sums)
    with launching(qkv):
        quantize_heads_kernel[(heads, blocks)](qkv, *operands, padded, num_heads, length, head_dim, **first.options())
        attention_kernel[(heads, triton.cdiv(length, block_m))](
            *operands, out, padded, num_heads, blocks, length, head_dim, **config.options()
        )
    return out
