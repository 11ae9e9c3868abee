"""``y = (q . T) scale alpha + low rank + bias``, eq. (5), from 2-bit weights that stay digits 0, 1, 2.

The product is W X^T, not X W^T: weights stay in registers as the first operand of the tensor cores, and int8 sums are
exact in int32. A byte of a 128-group holds one weight of each of four planes; a plane's 32 bytes, masked, already lie
where a tensor-core step of 32 int8 values wants them, so that nothing is shuffled. Digits are weights plus one, so the
row's sum of codes is subtracted afterwards.

The integer sum is exact in any order: tile sizes may follow the number of rows, and K may be split among programs. Each
leaves its part, and the last to arrive adds them up. The low-rank term is a product over the whole rank, added onto the
scaled sum: its order is the same for every tile size. Its float32 factors enter as two tf32 parts each.

The second axis of the grid is the layer of a group, the third the part of K.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.ops import Quantized
from robuq_core.kernels.triton.async_linear import MAX_RANK, STAGES, async_linear_kernel
from robuq_core.kernels.triton.config import (
    MIN_ROWS,
    UNPACK,
    LaunchConfig,
    fence_copies,
    gelu,
    launching,
    power_of_2,
    tf32_parts,
)
from robuq_core.kernels.triton.weights import Weights
from robuq_core.quant.packing import PLANAR_GROUP, PLANAR_GROUP_BYTES

LEAST_RANK = tl.constexpr(MIN_ROWS)
ROW_BUCKETS = (16, 64, 256, 1024, 4096)
# About as many programs as a large GPU has multiprocessors. A part of K takes a few groups, or its end costs more.
FEW_PROGRAMS, MIN_GROUPS, MAX_SPLIT = 160, 3, 4
MIN_ASYNC_ROWS = 1024

# What follows the product: nothing, GELU, or ``y[i] += gate * result`` in place.
PLAIN, GELU, ADD = range(3)

# Split products leave partial sums and count arrivals; tiles of one launch that may be split.
MAX_SPLIT_TILES = 4096


@triton.constexpr_function
def pieces(rows: int) -> int:
    """In how many pieces a tile of ``rows`` rows is finished."""
    return 8 if rows >= 128 else 4 if rows >= 64 else 2


@triton.jit
def _unpack(packed):  # type: ignore[no-untyped-def]
    """Bytes ``[n, 32]`` -> the digits of the four planes, int8 ``[n, 32]`` each."""
    return tl.inline_asm_elementwise(
        UNPACK, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def _pieces(total, PIECES: tl.constexpr, PIECE: tl.constexpr, OUTPUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[OUTPUTS, PIECES PIECE]`` as a tuple of ``[OUTPUTS, PIECE]``, from the first rows on."""
    low, high = tl.split(tl.permute(tl.reshape(total, [OUTPUTS, 2, PIECES // 2 * PIECE]), (0, 2, 1)))
    if PIECES == 2:
        return low, high
    else:
        return _pieces(low, PIECES // 2, PIECE, OUTPUTS) + _pieces(high, PIECES // 2, PIECE, OUTPUTS)


@triton.jit(do_not_specialize=["rows", "rows_per_image"])
def ternary_linear_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    sums_ptr,
    scales_ptr,
    lowrank_ptr,
    planar_ptr,
    alpha_ptr,
    bias_ptr,
    lowrank_a_ptr,
    gate_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    rows,
    rows_per_image,
    N,
    K: tl.constexpr,
    RANK: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
):
    """``ONE_IMAGE``: every piece of a tile has rows of one image."""
    layer = tl.program_id(1).to(tl.int64)
    groups: tl.constexpr = (K + 127) // 128
    codes_ptr += layer * rows * K
    sums_ptr += layer * rows
    scales_ptr += layer * rows
    lowrank_ptr += layer * rows * RANK
    planar_ptr += layer * N * (groups * 32)
    alpha_ptr += layer * N
    bias_ptr += layer * N
    lowrank_a_ptr += layer * N * RANK
    y_ptr += layer * rows * N
    # Programs that share weights run side by side, GROUP blocks of outputs at a time, for the sake of the L2 cache.
    row_blocks = tl.cdiv(rows, ROWS)
    output_blocks = tl.cdiv(N, OUTPUTS)
    first = tl.program_id(0) // (GROUP * row_blocks) * GROUP
    height = tl.minimum(output_blocks - first, GROUP)
    within = tl.program_id(0) % (GROUP * row_blocks)
    first_row = within // height * ROWS
    first_output = (first + within % height) * OUTPUTS
    # Rows beyond the last read the last row: their results are dropped, and loads need no mask.
    row_in = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    output_in = tl.minimum(first_output + tl.arange(0, OUTPUTS), N - 1).to(tl.int64)

    step = tl.arange(0, 128)
    codes_ptrs = codes_ptr + (row_in * K)[:, None] + step[None, :]
    planar_ptrs = planar_ptr + (output_in * (groups * 32))[:, None] + tl.arange(0, 32)[None, :]
    total = tl.zeros([OUTPUTS, ROWS], tl.int32)
    part = tl.program_id(2)
    for group in range(part * groups // SPLIT, (part + 1) * groups // SPLIT):
        if K % 128 == 0:
            codes = tl.load(codes_ptrs + group * 128)
        else:
            codes = tl.load(codes_ptrs + group * 128, mask=(step < K - group * 128)[None, :], other=0)
        p0, p1, p2, p3 = _unpack(tl.load(planar_ptrs + group * 32))
        planes = tl.join(tl.join(p0, p1), tl.join(p2, p3))
        digits = tl.reshape(tl.permute(planes, (0, 3, 2, 1)), [OUTPUTS, 128])
        fence_copies()
        total = tl.dot(digits, tl.trans(codes), total, out_dtype=tl.int32)

    # From here on a piece of the tile at a time: the low-rank term and what is read for the whole one would not fit
    # into the registers beside it.
    PIECES: tl.constexpr = pieces(ROWS)
    PIECE: tl.constexpr = ROWS // PIECES
    parts = _pieces(total, PIECES, PIECE, OUTPUTS)
    last = True
    if SPLIT > 1:
        size: tl.constexpr = OUTPUTS * PIECE
        at = tl.arange(0, OUTPUTS)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * (SPLIT * PIECES * size) + at
        for i in tl.static_range(PIECES):
            tl.store(partial_ptrs + (part * PIECES + i) * size, parts[i])
        tl.debug_barrier()  # every thread's part is stored before the arrival is counted
        last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            tl.store(arrived_ptr + tl.program_id(0), 0)  # as the next launch expects it
            tl.debug_barrier()
        for i in tl.static_range(PIECES):
            piece = parts[i]
            if SPLIT > 1:
                piece = tl.load(partial_ptrs + i * size, cache_modifier=".cg")
                for other in tl.static_range(1, SPLIT):
                    piece += tl.load(partial_ptrs + (other * PIECES + i) * size, cache_modifier=".cg")
            from_row = first_row + i * PIECE
            row = from_row + tl.arange(0, PIECE)
            output = first_output + tl.arange(0, OUTPUTS)
            near_row = tl.minimum(row, rows - 1)
            near_output = tl.minimum(output, N - 1)
            piece -= tl.load(sums_ptr + near_row)[None, :]
            scale = tl.load(scales_ptr + near_row)
            alpha = tl.load(alpha_ptr + near_output)
            y = piece.to(tl.float32) * (scale[None, :] * alpha[:, None])
            if RANK > 0:
                j = tl.arange(0, power_of_2(RANK, LEAST_RANK))
                x_ptrs = lowrank_ptr + (near_row.to(tl.int64) * RANK)[None, :] + j[:, None]
                x = tl.load(x_ptrs, mask=(j < RANK)[:, None], other=0.0)
                a_ptrs = lowrank_a_ptr + (near_output * RANK)[:, None] + j[None, :]
                a = tl.load(a_ptrs, mask=(j < RANK)[None, :], other=0.0)
                x_high, x_low = tf32_parts(x)
                a_high, a_low = tf32_parts(a)
                y = tl.dot(a_high, x_low, y, input_precision="tf32")
                y = tl.dot(a_low, x_high, y, input_precision="tf32")
                y = tl.dot(a_high, x_high, y, input_precision="tf32")
            y += tl.load(bias_ptr + near_output)[:, None]
            # One 64-bit base for the tile, 32-bit offsets within it.
            y_ptrs = y_ptr + (from_row.to(tl.int64) * N + first_output)
            y_ptrs += (tl.arange(0, PIECE) * N)[None, :] + tl.arange(0, OUTPUTS)[:, None]
            inside = (output < N)[:, None] & (row < rows)[None, :]
            if EPILOGUE == 1:
                y = gelu(y)
            elif EPILOGUE == 2:
                if ONE_IMAGE:
                    image = tl.minimum(from_row, rows - 1) // rows_per_image
                    gate = tl.load(gate_ptr + image * N + near_output)[:, None]
                else:
                    images = near_row // rows_per_image
                    gate = tl.load(gate_ptr + (images * N)[None, :] + output[:, None], mask=inside, other=0.0)
                y = tl.fma(gate, y, tl.load(y_ptrs, mask=inside, other=0.0))
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def row_bucket(rows: int) -> int:
    """The row count under which launches of ``rows`` rows are tuned."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


def async_config(rows: int, outputs: int, width: int, rank: int, architecture: int) -> LaunchConfig | None:
    """The launch shape of :mod:`robuq_core.kernels.triton.async_linear` with tiles of 128 or 256 ``outputs``, where it
    is of use: many rows, whole groups."""
    if architecture != 90 or rows < MIN_ASYNC_ROWS or width % PLANAR_GROUP or rank > MAX_RANK:
        return None
    return LaunchConfig({"ROWS": 128, "OUTPUTS": outputs, "GROUP": 8, "STAGES": STAGES}, outputs // 16, 1, 128)


@lru_cache(maxsize=256)
def default_config(rows: int, outputs: int, width: int, rank: int, architecture: int) -> LaunchConfig:
    """A launch shape for ``rows`` rows where nothing was measured: small tiles while there are few rows.

    Each four warps have 64 outputs: what picks the tensor-core instruction, and so the order of the low-rank sum, is
    the same for every number of rows. On 9.0 many rows take the asynchronous kernel, with tiles of 128 outputs: two
    programs share a multiprocessor. K is split while there are no more programs than :data:`FEW_PROGRAMS`.
    """
    chosen = async_config(rows, 128, width, rank, architecture)
    if chosen is not None and outputs >= 128:
        return chosen
    block = min(128, power_of_2(rows, 16))
    groups = -(-width // PLANAR_GROUP)
    tiles, split = -(-rows // block) * -(-outputs // 64), 1
    while split < MAX_SPLIT and split * tiles <= FEW_PROGRAMS and groups >= 2 * split * MIN_GROUPS:
        split *= 2
    return _config(block, split, architecture)


def group_config(architecture: int) -> LaunchConfig:
    """The launch shape of a group of layers: one for every number of rows, so that none compiles while serving."""
    return _config(16, 1, architecture)


def _config(rows: int, split: int, architecture: int) -> LaunchConfig:
    # Three stages where shared memory holds about 100 KB.
    stages = 3 if architecture in (86, 89, 120) else 4
    return LaunchConfig({"ROWS": rows, "OUTPUTS": 64, "GROUP": 8, "SPLIT": split}, 4, stages)


def shared_bytes(config: LaunchConfig) -> int:
    """Shared memory of the pipeline's buffers, an estimate from above."""
    blocks = config.blocks
    stages = blocks.get("STAGES", config.num_stages)
    return stages * (blocks["ROWS"] * PLANAR_GROUP + blocks["OUTPUTS"] * PLANAR_GROUP_BYTES)


def candidate_configs(rows: int, width: int, rank: int, architecture: int, shared_limit: int) -> list[LaunchConfig]:
    """What tuning tries for ``rows`` rows, likely ones first: tall tiles that are not taller than the rows."""
    found = [async_config(rows, outputs, width, rank, architecture) for outputs in (128, 256)]
    groups = max(MIN_GROUPS, -(-width // PLANAR_GROUP))
    for block, warps, split, stages in product((128, 64, 32, 16), (4, 8), (1, 2, 4), (4, 3, 5)):
        blocks = {"ROWS": block, "OUTPUTS": 16 * warps, "GROUP": 8, "SPLIT": split}
        if (block == 16 or block < 2 * rows) and split * MIN_GROUPS <= groups:
            found.append(LaunchConfig(blocks, warps, stages, max_registers=128 if warps == 8 else None))
    return [config for config in found if config is not None and shared_bytes(config) <= shared_limit]


def ternary_linear(
    x: Quantized,
    sums: Tensor,
    weights: Weights,
    config: LaunchConfig,
    arrived: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    epilogue: int = PLAIN,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Launch the kernel on checked, contiguous tensors; see :class:`robuq_core.kernels.ops.NarrowBackend`.

    Args:
        sums: of each row's codes, int32.
        arrived: int32 ``[MAX_SPLIT_TILES]``, zeros before and after.
        gate, residual: of the epilogue ``ADD``, float32 ``[B, N]`` and ``[M, N]``; the residual is returned.
    """
    rows, (outputs, width, rank), lead, device = x.codes.shape[-2], weights.shape, weights.lead, x.codes.device
    y = torch.empty(*lead, rows, outputs, dtype=dtype, device=device) if residual is None else residual
    if not rows or not outputs:
        return y
    blocks = config.blocks
    tiles = triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(outputs, blocks["OUTPUTS"])
    split = blocks.get("SPLIT", 1)
    if split > 1 and (lead or tiles > MAX_SPLIT_TILES or split > MAX_SPLIT):
        raise ValueError(f"{tiles} tiles of {lead or 1} layers cannot be split in {split}")
    per_image = 1 if gate is None else max(1, rows // gate.shape[0])
    layer = weights.layer
    of_layer = (layer.planar, layer.alpha, layer.bias, layer.lowrank_a)
    operands = (x.codes, sums, x.scales, x.lowrank, *of_layer, layer.alpha if gate is None else gate, y)
    numbers, fixed = (rows, per_image, outputs, width, rank, epilogue), config.options()
    with launching(x.codes):
        if "STAGES" in blocks:
            async_linear_kernel[(tiles,)](*operands, *numbers, **fixed)
        else:
            size = tiles * split * blocks["ROWS"] * blocks["OUTPUTS"]
            partial = arrived if split == 1 else torch.empty(size, dtype=torch.int32, device=device)
            one_image = epilogue == ADD and per_image % (blocks["ROWS"] // pieces(blocks["ROWS"])) == 0
            ternary_linear_kernel[(tiles, *(lead or (1,)), split)](
                *operands, partial, arrived, *numbers, ONE_IMAGE=one_image, **fixed
            )
    return y
