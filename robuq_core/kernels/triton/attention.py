"""Eight-bit attention as :mod:`robuq_core.quant.attention` defines it: exact products on the tensor cores.

On 9.0 and up to 256 tokens, one kernel takes a block of queries of a head against all its keys at once, and quantises
what it reads in registers. A head of 72 values is 64 and 8 of them there, not 128. Otherwise, a first kernel finds
scales and codes of Q and K (by token) and V (by head) and lays them out by head, padded with zeros. The second one goes
over the keys twice: first for a row's largest logit, then for the codes of its exponentials times the codes of V.

Every product multiplies int8 into int32. Codes of exponentials, 0..255, enter less 128, which fits int8; 128 times the
sums of V's codes puts it back. Integers: exact in any order.

Tiles depend on the head alone, so a picture's result does not depend on the pictures beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.triton.config import LaunchConfig, launching, next_power_of_2, round_up
from robuq_core.kernels.triton.elementwise import rounded_for

# An int8 product on the tensor cores takes at least 32 values of the inner dimension.
# 255 * 127 * 65536 < 2^31.
MIN_HEAD_TILE, MAX_HEAD_DIM, MAX_LENGTH = 32, 256, 2**16
# What one kernel takes: its logits lie in registers.
SHORT_LENGTH, SHORT_HEAD_DIM = 256, 128


def is_short(head_dim: int, length: int, architecture: int) -> bool:
    """Whether one kernel runs the attention: on 9.0, since its codes move between ``mma.sync``'s layouts by way of
    more registers than there are."""
    return architecture == 90 and length <= SHORT_LENGTH and head_dim <= SHORT_HEAD_DIM


def head_split(head_dim: int) -> tuple[int, int]:
    """Values of a head in its two tiles, (72, 0) or (64, 8): a tile is a power of two of 32 or more."""
    main = 1 << (head_dim.bit_length() - 1)
    return (main, head_dim - main) if main >= 64 and 0 < head_dim - main <= MIN_HEAD_TILE else (head_dim, 0)


def short_constants(head_dim: int, length: int) -> dict[str, int]:
    """Compile-time arguments of :func:`short_attention_kernel`, but for the launch shape."""
    main, tail = head_split(head_dim)
    return {
        "LENGTH": length,
        "KEYS": max(MIN_HEAD_TILE, next_power_of_2(length)),
        "HEAD": head_dim,
        "MAIN": main,
        "MAIN_TILE": max(MIN_HEAD_TILE, next_power_of_2(main)),
        "TAIL": tail,
        "TAIL_TILE": MIN_HEAD_TILE,
        "TAIL_OUT": max(16, next_power_of_2(tail)),
    }


def short_config(length: int) -> LaunchConfig:
    """Of :func:`short_attention_kernel`: queries per program."""
    return LaunchConfig({"BLOCK_M": 64 if length > 32 else 32}, 8 if length > 128 else 4, 1)


def default_config(head_dim: int) -> LaunchConfig:
    """Of :func:`attention_kernel`: queries and keys a tile."""
    if head_dim > 128:
        return LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2)
    return LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)


def quantize_config(head_dim: int) -> LaunchConfig:
    """Of :func:`quantize_heads_kernel`: tokens per program, each of which reads all of its head's V."""
    return LaunchConfig({"BLOCK": 64 if head_tile(head_dim) <= 128 else 32}, 8, 1)


def head_tile(head_dim: int) -> int:
    return max(MIN_HEAD_TILE, next_power_of_2(head_dim))


def constants(head_dim: int, length: int) -> dict[str, int]:
    """Compile-time arguments of both kernels, but for the launch shape. A model has one ``length``."""
    return {"LENGTH": length, "HEAD": head_dim, "HEAD_TILE": head_tile(head_dim)}


@triton.jit
def _round(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scaled(largest):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.div_rn(largest, 127.0), 1e-30)


@triton.jit
def _quantized(x, scale):  # type: ignore[no-untyped-def]
    return _round(tl.div_rn(x, scale)).to(tl.int8)


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
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens of one head of one picture. ``padded``: tokens of the padded layout."""
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
    HEAD_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head of one picture against all its keys. ``blocks``: of the sums of V's codes."""
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
        p = _round(tl.exp(tl.minimum(logits - largest[:, None], 0.0)) * 255.0).to(tl.int32)
        total += tl.sum(p, 1)
        v = tl.load(v_ptr + key[:, None] * HEAD_TILE + column[None, :])
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
    out = rounded_for(out_ptr, product.to(tl.float32) * factor[:, None])
    tl.store(out_ptr + query[:, None] * width + column[None, :], out, mask=real)


@triton.jit
def _values(pointer, token, stride, first, WIDTH: tl.constexpr, TILE: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values ``first .. first + WIDTH`` of the tokens' heads, zeros around them."""
    column = tl.arange(0, TILE)
    real = (token < LENGTH)[:, None] & (column < WIDTH)[None, :]
    here = token[:, None] * stride + (first + column)[None, :]
    return tl.load(pointer + here, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _largest_by_token(  # type: ignore[no-untyped-def]
    pointer,
    token,
    stride,
    MAIN: tl.constexpr,
    MAIN_TILE: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    largest = tl.max(tl.abs(_values(pointer, token, stride, 0, MAIN, MAIN_TILE, LENGTH)), 1)
    if TAIL > 0:
        tail = tl.max(tl.abs(_values(pointer, token, stride, MAIN, TAIL, TAIL_TILE, LENGTH)), 1)
        largest = tl.maximum(largest, tail)
    return largest


@triton.jit
def _store_heads(  # type: ignore[no-untyped-def]
    p_codes,
    v_codes,
    factor,
    out_ptr,
    query,
    width,
    first,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Outputs ``first .. first + WIDTH`` of the queries. ``v_codes``: as floats, whose sums are exact."""
    v_sums = tl.sum(v_codes, 0).to(tl.int32)
    product = tl.dot(p_codes, v_codes.to(tl.int8), out_dtype=tl.int32) + 128 * v_sums[None, :]
    column = tl.arange(0, TILE)
    real = (query < LENGTH)[:, None] & (column < WIDTH)[None, :]
    here = out_ptr + query[:, None] * width + (first + column)[None, :]
    tl.store(here, rounded_for(out_ptr, product.to(tl.float32) * factor), mask=real)


@triton.jit(do_not_specialize=["heads"])
def short_attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    out_ptr,
    heads,
    LENGTH: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    MAIN_TILE: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_TILE: tl.constexpr,
    TAIL_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of queries of one head of one image against all its keys, up to 256 tokens."""
    head = tl.program_id(0).to(tl.int64)
    width = heads * HEAD
    stride = 3 * width
    qkv_ptr += (head // heads) * LENGTH * stride + (head % heads) * HEAD
    k_ptr = qkv_ptr + width
    v_ptr = k_ptr + width
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.arange(0, KEYS)

    # Values are read again after their largest one is known: kept till then, they would not fit into the registers.
    q_scale = _scaled(_largest_by_token(qkv_ptr, query, stride, MAIN, MAIN_TILE, TAIL, TAIL_TILE, LENGTH))[:, None]
    k_scale = _scaled(_largest_by_token(k_ptr, key, stride, MAIN, MAIN_TILE, TAIL, TAIL_TILE, LENGTH))[:, None]
    tl.debug_barrier()
    q = _quantized(_values(qkv_ptr, query, stride, 0, MAIN, MAIN_TILE, LENGTH), q_scale)
    k = _quantized(_values(k_ptr, key, stride, 0, MAIN, MAIN_TILE, LENGTH), k_scale)
    logits = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
    if TAIL > 0:
        tl.debug_barrier()
        q = _quantized(_values(qkv_ptr, query, stride, MAIN, TAIL, TAIL_TILE, LENGTH), q_scale)
        k = _quantized(_values(k_ptr, key, stride, MAIN, TAIL, TAIL_TILE, LENGTH), k_scale)
        logits = tl.dot(q, tl.trans(k), logits, out_dtype=tl.int32)
    x = logits.to(tl.float32) * (q_scale * (HEAD**-0.5)) * tl.trans(k_scale)
    x = tl.where((key < LENGTH)[None, :], x, float("-inf"))
    p = _round(tl.exp(tl.minimum(x - tl.max(x, 1)[:, None], 0.0)) * 255.0)
    total = tl.sum(p.to(tl.int32), 1)
    p_codes = (p - 128.0).to(tl.int8)

    tl.debug_barrier()  # or the compiler reads V before all that, and spills
    largest = tl.max(_largest_by_token(v_ptr, key, stride, MAIN, MAIN_TILE, TAIL, TAIL_TILE, LENGTH), 0)
    v_scale = _scaled(largest)
    factor = tl.div_rn(v_scale, total.to(tl.float32))[:, None]
    out_ptr += (head // heads) * LENGTH * width + (head % heads) * HEAD
    tl.debug_barrier()
    v = _round(tl.div_rn(_values(v_ptr, key, stride, 0, MAIN, MAIN_TILE, LENGTH), v_scale))
    _store_heads(p_codes, v, factor, out_ptr, query, width, 0, MAIN, MAIN_TILE, LENGTH)
    if TAIL > 0:
        v = _round(tl.div_rn(_values(v_ptr, key, stride, MAIN, TAIL, TAIL_OUT, LENGTH), v_scale))
        _store_heads(p_codes, v, factor, out_ptr, query, width, MAIN, TAIL, TAIL_OUT, LENGTH)


def attention(qkv: Tensor, num_heads: int, architecture: int, config: LaunchConfig | None = None) -> Tensor:
    """Launch the kernels on contiguous ``qkv [B, L, 3 D]``, float32 or bfloat16 -> ``[B, L, D]`` of the same dtype.

    Raises:
        ValueError: heads of more than 256 values, or more than 2^16 tokens: the products would not be exact.
    """
    images, length, triple = qkv.shape
    head_dim = triple // 3 // num_heads
    if head_dim > MAX_HEAD_DIM or length > MAX_LENGTH:
        raise ValueError(f"attention takes head_dim up to {MAX_HEAD_DIM} and {MAX_LENGTH} tokens, "
                         f"not {head_dim} and {length}")  # fmt: skip
    out = torch.empty(images, length, triple // 3, dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    if config is None and is_short(head_dim, length, architecture):
        short = short_config(length)
        grid = (images * num_heads, triton.cdiv(length, short.blocks["BLOCK_M"]))
        with launching(qkv):
            short_attention_kernel[grid](*(qkv, out, num_heads), **short_constants(head_dim, length), **short.options())
        return out
    config = config or default_config(head_dim)
    first = quantize_config(head_dim)
    block, block_m = first.blocks["BLOCK"], config.blocks["BLOCK_M"]
    padded = round_up(length, max(block, block_m, config.blocks["BLOCK_N"]))
    device, heads, tile = qkv.device, images * num_heads, head_tile(head_dim)
    q, k, v = (torch.empty(heads, padded, tile, dtype=torch.int8, device=device) for _ in range(3))
    q_scales, k_scales = (torch.empty(heads, padded, device=device) for _ in range(2))
    v_scales = torch.empty(heads, device=device)
    blocks = padded // block
    v_sums = torch.empty(heads, blocks, tile, dtype=torch.int32, device=device)
    operands = (q, k, v, q_scales, k_scales, v_scales, v_sums)
    fixed = constants(head_dim, length)
    with launching(qkv):
        quantize_heads_kernel[(heads, blocks)](*(qkv, *operands, padded, num_heads), **fixed, **first.options())
        attention_kernel[(heads, triton.cdiv(length, block_m))](
            *(*operands, out, padded, num_heads, blocks), **fixed, **config.options()
        )
    return out
