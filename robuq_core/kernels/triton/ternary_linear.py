"""``y = (q . T) scale alpha + low rank + bias``, eq. (5), from 2-bit weights decoded in registers.

The product is W X^T, not X W^T: decoded weights stay in registers as the first operand of the tensor cores, and int8
sums are exact in int32. A byte of a 128-group holds one weight of each of four planes; a plane's 32 bytes, decoded,
already lie where a tensor-core step of 32 int8 values wants them, so that nothing is shuffled.

The integer sum is exact in any order, so tile sizes may follow the number of rows. The low-rank term is a product over
the whole rank, added onto the scaled sum: its order is the same for every tile size. Its float32 factors enter as two
tf32 parts each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.ops import Quantized, TernaryLayer
from robuq_core.kernels.triton.config import LaunchConfig, launching, next_power_of_2
from robuq_core.kernels.triton.rounding import rounded_for
from robuq_core.quant.packing import PLANAR_GROUP, PLANAR_GROUP_BYTES

MIN_RANK_TILE = 16
ROW_BUCKETS = (16, 64, 256, 1024, 4096)

# Four weights at once: the low two bits of each byte less one, without a borrow between bytes.
_DECODE = tl.constexpr(
    "{\n.reg .b32 t;\n"
    + "".join(
        f"shr.u32 t, $4, {2 * i};\nand.b32 t, t, 0x03030303;\nor.b32 t, t, 0x80808080;\n"
        f"sub.u32 t, t, 0x01010101;\nxor.b32 ${i}, t, 0x80808080;\n"
        for i in range(4)
    )
    + "}"
)


@triton.jit
def _decode(packed):  # type: ignore[no-untyped-def]
    """Bytes ``[n, 32]`` -> the four planes, int8 ``[n, 32]`` each."""
    return tl.inline_asm_elementwise(
        _DECODE, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def _tf32_parts(x):  # type: ignore[no-untyped-def]
    """``x`` as a sum of two values of tf32's 11 significant bits (the second is cut by the product itself)."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit(do_not_specialize=["rows"])
def ternary_linear_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    scales_ptr,
    lowrank_ptr,
    weight_ptr,
    alpha_ptr,
    bias_ptr,
    lowrank_a_ptr,
    y_ptr,
    rows,
    N,
    K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that share weights run side by side, GROUP blocks of outputs at a time, for the sake of the L2 cache.
    row_blocks = tl.cdiv(rows, ROWS)
    output_blocks = tl.cdiv(N, OUTPUTS)
    first = tl.program_id(0) // (GROUP * row_blocks) * GROUP
    height = tl.minimum(output_blocks - first, GROUP)
    within = tl.program_id(0) % (GROUP * row_blocks)
    first_row = within // height * ROWS
    first_output = (first + within % height) * OUTPUTS
    row = first_row + tl.arange(0, ROWS)
    output = first_output + tl.arange(0, OUTPUTS)
    live, real = row < rows, output < N
    # Rows beyond the last read the last row: their results are dropped, and loads need no mask.
    row_in = tl.minimum(row, rows - 1).to(tl.int64)
    output_in = tl.minimum(output, N - 1).to(tl.int64)

    groups: tl.constexpr = (K + 127) // 128
    step = tl.arange(0, 128)
    codes_ptrs = codes_ptr + (row_in * K)[:, None] + step[None, :]
    if PACKED:
        weight_ptrs = weight_ptr + (output_in * (groups * 32))[:, None] + tl.arange(0, 32)[None, :]
    else:
        weight_ptrs = weight_ptr + (output_in * K)[:, None] + step[None, :]
    total = tl.zeros([OUTPUTS, ROWS], tl.int32)
    for group in range(groups):
        if K % 128 == 0:
            codes = tl.load(codes_ptrs + group * 128)
        else:
            codes = tl.load(codes_ptrs + group * 128, mask=(step < K - group * 128)[None, :], other=0)
        if PACKED:
            p0, p1, p2, p3 = _decode(tl.load(weight_ptrs + group * 32))
            planes = tl.join(tl.join(p0, p1), tl.join(p2, p3))
            weight = tl.reshape(tl.permute(planes, (0, 3, 2, 1)), [OUTPUTS, 128])
        elif K % 128 == 0:
            weight = tl.load(weight_ptrs + group * 128)
        else:
            weight = tl.load(weight_ptrs + group * 128, mask=(step < K - group * 128)[None, :], other=0)
        total = tl.dot(weight, tl.trans(codes), total, out_dtype=tl.int32)

    scale = tl.load(scales_ptr + row_in)
    alpha = tl.load(alpha_ptr + output_in)
    y = total.to(tl.float32) * (scale[None, :] * alpha[:, None])
    if RANK > 0:
        j = tl.arange(0, RANK_TILE)
        x = tl.load(lowrank_ptr + (row_in * RANK)[None, :] + j[:, None], mask=(j < RANK)[:, None], other=0.0)
        a = tl.load(lowrank_a_ptr + (output_in * RANK)[:, None] + j[None, :], mask=(j < RANK)[None, :], other=0.0)
        x_high, x_low = _tf32_parts(x)
        a_high, a_low = _tf32_parts(a)
        y = tl.dot(a_high, x_low, y, input_precision="tf32")
        y = tl.dot(a_low, x_high, y, input_precision="tf32")
        y = tl.dot(a_high, x_high, y, input_precision="tf32")
    y += tl.load(bias_ptr + output_in)[:, None]
    # One 64-bit base for the tile, 32-bit offsets within it.
    y_ptr += first_row.to(tl.int64) * N + first_output
    within_tile = (tl.arange(0, ROWS) * N)[None, :] + tl.arange(0, OUTPUTS)[:, None]
    tl.store(y_ptr + within_tile, rounded_for(y_ptr, y), mask=real[:, None] & live[None, :])


def row_bucket(rows: int) -> int:
    """The row count under which launches of ``rows`` rows are tuned."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


@lru_cache(maxsize=256)
def default_config(rows: int, outputs: int, architecture: int) -> LaunchConfig:
    """A launch shape for ``rows`` rows where nothing was measured: small tiles while there are few rows.

    Every tile has 64 outputs or more: what picks the tensor-core instruction, and so the order of the low-rank sum, is
    the same for every number of rows.
    """
    block = min(128, max(16, next_power_of_2(rows)))
    wide = block >= 64 and outputs >= 128
    stages = 3 if architecture in (86, 89, 120) else 4
    return LaunchConfig({"ROWS": block, "OUTPUTS": 128 if wide else 64, "GROUP": 8}, 8 if wide else 4, stages)


def shared_bytes(config: LaunchConfig, packed: bool) -> int:
    """Shared memory of the pipeline's buffers, an estimate from above."""
    per_output = PLANAR_GROUP_BYTES if packed else PLANAR_GROUP
    blocks = config.blocks
    return config.num_stages * (blocks["ROWS"] * PLANAR_GROUP + blocks["OUTPUTS"] * per_output)


def candidate_configs(rows: int, shared_limit: int, packed: bool = True) -> list[LaunchConfig]:
    """What tuning tries for ``rows`` rows: tiles no taller than the rows, buffers that fit, 128 sums a thread."""
    found = []
    for block in (16, 32, 64, 128, 256):
        if block > 16 and block >= 2 * rows:
            continue
        for outputs in (64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4, 5):
                    config = LaunchConfig({"ROWS": block, "OUTPUTS": outputs, "GROUP": 8}, warps, stages)
                    sums = block * outputs // (32 * warps)
                    if sums <= 128 and outputs >= 16 * warps and shared_bytes(config, packed) <= shared_limit:
                        found.append(config)
    return found


def constants(width: int, rank: int, packed: bool) -> dict[str, int | bool]:
    """The kernel's compile-time arguments for a layer, but for the launch shape."""
    rank_tile = max(MIN_RANK_TILE, next_power_of_2(rank))
    return {
        "K": width,
        "RANK": rank,
        "RANK_TILE": rank_tile,
        "PACKED": packed,
    }


def ternary_linear(
    x: Quantized,
    layer: TernaryLayer,
    config: LaunchConfig,
    expanded: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.NarrowBackend`.

    Args:
        expanded: the ternary codes as int8 ``[N, K]``, read in place of the packed ones: four times the bytes, no
            decoding.
    """
    rows, outputs, rank = x.codes.shape[0], layer.out_features, layer.rank
    y = torch.empty(rows, outputs, dtype=dtype, device=x.codes.device)
    if rows and outputs:
        blocks = config.blocks
        grid = (triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(outputs, blocks["OUTPUTS"]),)
        weight = layer.planar if expanded is None else expanded
        with launching(x.codes):
            ternary_linear_kernel[grid](
                *(x.codes, x.scales, x.lowrank, weight, layer.alpha, layer.bias, layer.lowrank_a, y, rows, outputs),
                **constants(layer.in_features, rank, expanded is None),
                **config.options(),
            )
    return y
