"""The ternary product for many rows on compute capability 9.0, in Gluon: the tensor cores never wait for digits.

The same numbers as :mod:`robuq_core.kernels.triton.ternary_linear`, to the bit. Triton waits for each int8 product
before it continues; here the product of a group of 128 runs while the next group's digits are unpacked into
registers and later groups arrive in a ring in shared memory. Tiles have up to 256 outputs, since a row of codes is read
from the L2 cache once per tile and takes four times the bytes of a row of digits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from robuq_core.kernels.triton.config import MIN_ROWS, UNPACK, gelu, power_of_2, tf32_parts

# Their source serves both languages.
_gelu, _tf32_parts = gluon.jit(gelu.fn), gluon.jit(tf32_parts.fn)
# Triton 3.6 and 3.7 name it differently.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Rows that are finished at once: what the rest of the tile does not leave registers for has to wait.
PIECE = gl.constexpr(16)
# A row of the low-rank factor in shared memory has at most 128 bytes.
MAX_RANK, LEAST_RANK = 32, gl.constexpr(MIN_ROWS)
MAX_UNROLL, STAGES = 12, 4


@gluon.constexpr_function
def unrolled(groups: int) -> int:
    """Products of one pass of the loop: at its end the next digits are not unpacked ahead. Whole turns of the ring are
    best, as its places are constants then."""
    divisors = [each for each in range(1, MAX_UNROLL + 1) if groups % each == 0]
    return max(divisors, key=lambda each: (each == groups or each % STAGES == 0, each))


@gluon.constexpr_function
def _product_layout(rows: int, depth: int, warps: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, rows, depth])


@gluon.constexpr_function
def _packed_layout(outputs: int, warps: int) -> gl.DistributedLinearLayout:
    """Bytes ``[outputs, 32]`` so that unpacking them leaves each digit where the tensor cores want it."""
    over_warps = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    registers = [[0, 1], [0, 2], [8, 0], [0, 16]]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, over_warps, [], [outputs, 32])


@gluon.constexpr_function
def _store_layout(outputs: int, bits: int, warps: int) -> gl.BlockedLayout:
    values = 128 // bits
    lanes = min(32, outputs // values)
    return gl.BlockedLayout([values, 1], [lanes, 32 // lanes], [1, warps], [0, 1])


@gluon.jit
def _digits(packed, OUTPUTS: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    p0, p1, p2, p3 = gl.inline_asm_elementwise(
        UNPACK, "=&r,=&r,=&r,=&r,r", [packed], dtype=(gl.int8, gl.int8, gl.int8, gl.int8), is_pure=True, pack=4
    )
    planes = gl.join(gl.join(p0, p1), gl.join(p2, p3))
    digits = gl.reshape(gl.permute(planes, (0, 3, 2, 1)), [OUTPUTS, 128])
    return gl.convert_layout(digits, layout, assert_trivial=True)


@gluon.jit
def _fetch(codes_ring, planar_ring, place, codes_ptrs, planar_ptrs, group, GROUPS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Past the end the last group again, which nothing reads."""
    at = gl.minimum(group, GROUPS - 1)
    async_copy.async_copy_global_to_shared(codes_ring.index(place), codes_ptrs + at * 128)
    async_copy.async_copy_global_to_shared(planar_ring.index(place), planar_ptrs + at * 32)
    async_copy.commit_group()


@gluon.jit
def _pieces(total, PIECE: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    """``[OUTPUTS, n PIECE]`` as a tuple of ``[OUTPUTS, PIECE]``, from the first rows on."""
    if total.shape[1] == PIECE:
        return (gl.convert_layout(total, layout, assert_trivial=True),)
    else:
        HALF: gl.constexpr = total.shape[1] // 2
        low, high = gl.split(gl.permute(gl.reshape(total, [total.shape[0], 2, HALF]), (0, 2, 1)))
        return _pieces(low, PIECE, layout) + _pieces(high, PIECE, layout)


@gluon.jit(do_not_specialize=["rows", "rows_per_image"])
def async_linear_kernel(  # type: ignore[no-untyped-def]
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
    rows,
    rows_per_image,
    N,
    K: gl.constexpr,
    RANK: gl.constexpr,
    EPILOGUE: gl.constexpr,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    GROUPS: gl.constexpr = K // 128
    UNROLL: gl.constexpr = unrolled(GROUPS)
    RANK_TILE: gl.constexpr = power_of_2(RANK, LEAST_RANK)
    sums_layout: gl.constexpr = _product_layout(ROWS, 32, num_warps)
    digits_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 4)
    packed_layout: gl.constexpr = _packed_layout(OUTPUTS, num_warps)
    codes_load: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [num_warps, 1], [1, 0])
    planar_load: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [num_warps, 1], [1, 0])
    codes_ring = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, 128], gl.NVMMASharedLayout(128, 8, 2))
    planar_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, OUTPUTS, 32], gl.SwizzledSharedLayout(16, 4, 2, [1, 0]))

    # As in ternary_linear: programs that share weights run side by side.
    row_blocks = gl.cdiv(rows, ROWS)
    output_blocks = gl.cdiv(N, OUTPUTS)
    first = gl.program_id(0) // (GROUP * row_blocks) * GROUP
    height = gl.minimum(output_blocks - first, GROUP)
    within = gl.program_id(0) % (GROUP * row_blocks)
    first_row = within // height * ROWS
    first_output = (first + within % height) * OUTPUTS
    # Rows and outputs beyond the last read the last: their results are dropped.
    row_in = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, codes_load)), rows - 1).to(gl.int64)
    output_in = gl.minimum(first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, planar_load)), N - 1)
    codes_ptrs = codes_ptr + (row_in * K)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, codes_load))[None, :]
    planar_ptrs = planar_ptr + (output_in * (GROUPS * 32))[:, None]
    planar_ptrs += gl.arange(0, 32, gl.SliceLayout(0, planar_load))[None, :]

    for early in gl.static_range(STAGES - 2):
        _fetch(codes_ring, planar_ring, early, codes_ptrs, planar_ptrs, early, GROUPS)
    total = gl.zeros([OUTPUTS, ROWS], gl.int32, sums_layout)
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    _barrier()
    for start in range(0, GROUPS, UNROLL):
        turn = 0 if UNROLL % STAGES == 0 else start
        digits = _digits(planar_ring.index(turn % STAGES).load(packed_layout), OUTPUTS, digits_layout)
        for i in gl.static_range(UNROLL):
            codes = codes_ring.index((turn + i) % STAGES).permute((1, 0))
            under_way = warpgroup_mma(digits, codes, total, is_async=True)
            # Into what the product before the last one read, which every warp has waited for.
            place = (turn + i + STAGES - 2) % STAGES
            _fetch(codes_ring, planar_ring, place, codes_ptrs, planar_ptrs, start + i + STAGES - 2, GROUPS)
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
            _barrier()
            if i + 1 < UNROLL:
                packed = planar_ring.index((turn + i + 1) % STAGES).load(packed_layout)
                following = _digits(packed, OUTPUTS, digits_layout)
            total = warpgroup_mma_wait(0, deps=(under_way,))
            if i + 1 < UNROLL:
                digits = following
    async_copy.wait_group(0)

    # From here on 16 rows at a time, as in ternary_linear.
    piece_layout: gl.constexpr = _product_layout(PIECE, 8, num_warps)
    output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, piece_layout))
    output_in = gl.minimum(output, N - 1)
    alpha = gl.load(alpha_ptr + output_in)
    bias = gl.load(bias_ptr + output_in)
    if RANK > 0:
        x_load: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [num_warps, 1], [1, 0])
        factor_layout: gl.constexpr = gl.DotOperandLayout(0, piece_layout, 1)
        shared: gl.constexpr = gl.NVMMASharedLayout(4 * RANK_TILE, 32, 2)
        row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, x_load)), rows - 1).to(gl.int64)
        j = gl.arange(0, RANK_TILE, gl.SliceLayout(0, x_load))
        x = gl.load(lowrank_ptr + (row * RANK)[:, None] + j[None, :], mask=(j < RANK)[None, :], other=0.0)
        high, low = _tf32_parts(x)
        x_high = gl.allocate_shared_memory(gl.float32, [ROWS, RANK_TILE], shared, high)
        x_low = gl.allocate_shared_memory(gl.float32, [ROWS, RANK_TILE], shared, low)
        fence_async_shared()
        _barrier()
        at = gl.minimum(first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, factor_layout)), N - 1)
        j = gl.arange(0, RANK_TILE, gl.SliceLayout(0, factor_layout))
        a = gl.load(lowrank_a_ptr + (at * RANK)[:, None] + j[None, :], mask=(j < RANK)[None, :], other=0.0)
        a_high, a_low = _tf32_parts(a)

    # 16 bytes of neighbouring outputs per thread and store.
    store: gl.constexpr = _store_layout(OUTPUTS, y_ptr.dtype.element_ty.primitive_bitwidth, num_warps)
    store_output = first_output + gl.arange(0, OUTPUTS, gl.SliceLayout(1, store))
    parts = _pieces(total, PIECE, piece_layout)
    for i in gl.static_range(ROWS // PIECE):
        row = first_row + i * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, piece_layout))
        row_in = gl.minimum(row, rows - 1)
        piece = parts[i] - gl.load(sums_ptr + row_in)[None, :]
        y = piece.to(gl.float32) * (gl.load(scales_ptr + row_in)[None, :] * alpha[:, None])
        if RANK > 0:
            high = x_high.slice(i * PIECE, PIECE, 0).permute((1, 0))
            low = x_low.slice(i * PIECE, PIECE, 0).permute((1, 0))
            y = warpgroup_mma(a_high, low, y)
            y = warpgroup_mma(a_low, high, y)
            y = warpgroup_mma(a_high, high, y)
        y += bias[:, None]
        if EPILOGUE == 1:
            y = _gelu(y)
        stored_row = first_row + i * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, store))
        y_ptrs = y_ptr + (stored_row.to(gl.int64) * N)[None, :] + store_output[:, None]
        inside = (store_output < N)[:, None] & (stored_row < rows)[None, :]
        if EPILOGUE == 2:
            y = gl.convert_layout(y, store)
            image = gl.minimum(stored_row, rows - 1) // rows_per_image
            gate = gl.load(gate_ptr + (image * N)[None, :] + store_output[:, None], mask=inside, other=0.0)
            y = gl.fma(gate, y, gl.load(y_ptrs, mask=inside, other=0.0))
            gl.store(y_ptrs, y, mask=inside)
        else:
            gl.store(y_ptrs, gl.convert_layout(y.to(y_ptr.dtype.element_ty), store), mask=inside)
