"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma (PTX ISA, "Warp-level matrix instructions" and
"Asynchronous warpgroup-level matrix instructions").

Products are exact, and rounded once per instruction: how a GPU's tensor cores round is not modelled.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ptx.memory import Array
from ptx.program import Address, Instruction, Operand, PtxError

if TYPE_CHECKING:
    from ptx.machine import Blocks

WORD, LONG = np.dtype(np.uint32), np.dtype(np.uint64)
LANE = np.arange(32)
# Bytes of a value, and how float64 is made of them.
SIZES = {"s8": 1, "u8": 1, "f16": 2, "bf16": 2, "tf32": 4}


def _numbers(raw: Array, kind: str) -> Array:
    """Bytes ``[..., n]`` as float64 ``[..., n / size]``."""
    raw = np.ascontiguousarray(raw)
    if kind in ("s8", "u8"):
        return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _words(blocks: Blocks, registers: tuple[Operand, ...]) -> Array:
    """``[blocks, warps, 32, registers]``."""
    values = [np.broadcast_to(blocks.read(each, WORD), blocks.shape) for each in registers]
    return np.stack(values, axis=-1).reshape(len(blocks.blocks), blocks.warps, 32, len(registers))


@cache
def _places(registers: int, size: int) -> tuple[Array, Array]:
    """Row and column of every value in the first operand's registers, ``[32, registers, values]``."""
    per = 4 // size
    lane, i, e = np.meshgrid(LANE, np.arange(registers), np.arange(per), indexing="ij")
    return lane // 4 + 8 * (i % 2), lane % 4 * per + e + 4 * per * (i // 2)


def _matrix(blocks: Blocks, registers: tuple[Operand, ...], kind: str, rows: int = 16) -> Array:
    """``A [blocks, warps, 16, k]`` of 2 or 4 registers. With 8 rows: ``B`` transposed, of 1 or 2, which lie like the
    first rows of ``A``."""
    words, size, every = _words(blocks, registers), SIZES[kind], 16 // rows
    row, column = (each[:, ::every] for each in _places(every * len(registers), size))
    matrix = np.zeros((*words.shape[:2], rows, 8 // size * every * len(registers)))
    matrix[:, :, row, column] = _numbers(words.view(np.uint8), kind).reshape(*words.shape, 4 // size)
    return matrix


@cache
def _sum_places(registers: int) -> tuple[Array, Array]:
    lane, i = np.meshgrid(LANE, np.arange(registers), indexing="ij")
    return lane // 4 + 8 * (i // 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i // 4)


def _sums(blocks: Blocks, registers: tuple[Operand, ...], kind: str) -> Array:
    """``C [blocks, warps, 16, 2 registers]``."""
    words = _words(blocks, registers)
    matrix = np.zeros((*words.shape[:2], 16, 2 * len(registers)))
    matrix[(slice(None), slice(None), *_sum_places(len(registers)))] = words.view(np.int32 if kind == "s32" else "f4")
    return matrix


def _store_sums(blocks: Blocks, registers: tuple[Operand, ...], matrix: Array, kind: str) -> None:
    values = matrix[(slice(None), slice(None), *_sum_places(len(registers)))]
    values = values.astype(np.int64).astype(np.int32) if kind == "s32" else values.astype(np.float32)
    values = values.reshape(*blocks.shape, len(registers))
    for i, register in enumerate(registers):
        blocks.write(register, np.ascontiguousarray(values[..., i]))


def multiply_in_warp(blocks: Blocks, instruction: Instruction, mask: Array | None) -> None:
    """``mma.sync``: d = a b + c by each warp."""
    found = re.search(r"m16n8k\d+\.row\.col(?:\.satfinite)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)$", instruction.name)
    if found is None or found[1] not in ("s32", "f32") or not {found[2], found[3]} <= SIZES.keys():
        raise NotImplementedError
    d, a, b, c = (each if isinstance(each, tuple) else (each,) for each in instruction.operands)
    product = _matrix(blocks, a, found[2]) @ _matrix(blocks, b, found[3], 8).swapaxes(2, 3)
    _store_sums(blocks, d, product + _sums(blocks, c, found[1]), found[1])


# ldmatrix and stmatrix: 8 x 8 matrices of 16 bits; lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i.


def _matrix_places(blocks: Blocks, instruction: Instruction, address: Address, i: int) -> tuple[Array, Array]:
    at, block, thread, _ = blocks._active(address, None)
    rows = (blocks.thread % 32 // 8) == i
    places = blocks.shared.at(block[rows], thread[rows], at[rows], 16, instruction.text)
    return places, np.repeat(thread[rows], 16)


def _matrices(instruction: Instruction) -> tuple[bool, int]:
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise NotImplementedError
    return "trans" in instruction.parts, next(int(part[1:]) for part in instruction.parts if part in ("x1", "x2", "x4"))


def load_matrix(blocks: Blocks, instruction: Instruction, mask: Array | None) -> None:
    transposed, count = _matrices(instruction)
    target, address = instruction.operands
    targets = target if isinstance(target, tuple) else (target,)
    for i in range(count):
        places, thread = _matrix_places(blocks, instruction, address, i)
        found = blocks.shared.read(places, thread, instruction.text)
        matrix = found.view(np.uint16).reshape(len(blocks.blocks), blocks.warps, 8, 8)
        if transposed:
            matrix = matrix.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrix.reshape(*matrix.shape[:2], 32, 2)).view(np.uint32)
        blocks.write(targets[i], pairs.reshape(blocks.shape))


def store_matrix(blocks: Blocks, instruction: Instruction, mask: Array | None) -> None:
    transposed, count = _matrices(instruction)
    address, source = instruction.operands
    sources = source if isinstance(source, tuple) else (source,)
    for i in range(count):
        places, thread = _matrix_places(blocks, instruction, address, i)
        matrix = _words(blocks, (sources[i],)).view(np.uint16).reshape(len(blocks.blocks), blocks.warps, 8, 8)
        if transposed:
            matrix = matrix.swapaxes(2, 3)
        blocks.shared.write(places, np.ascontiguousarray(matrix).view(np.uint8).reshape(-1), thread, instruction.text)


# wgmma: 128 threads multiply 64 x k by k x n; operands in shared memory are read until wgmma.wait_group.


def wgmma(blocks: Blocks, instruction: Instruction, mask: Array | None) -> None:
    kind = instruction.parts[1]
    if kind == "fence":
        blocks.fenced_registers = blocks.steps
    elif kind == "commit_group":
        blocks.products.append([])
    elif kind == "wait_group":
        _wait(blocks, int(instruction.operands[0]))
    else:
        _multiply(blocks, instruction)


def _wait(blocks: Blocks, pending: int) -> None:
    shared = blocks.shared
    while len(blocks.products) - 1 > pending:
        for places, thread, _, _ in blocks.products.pop(0):
            shared.in_use[places] = False
            # A warp that has waited may be ahead of the others, whose part still reads.
            for each in range(0, 128, 32):
                shared.note_read(places, thread + each)
    rest = [each for group in blocks.products for each in group]
    for places, *_ in rest:
        shared.in_use[places] = True
    blocks.accumulating = frozenset().union(*(each[2] for each in rest))
    blocks.feeding = frozenset().union(*(each[3] for each in rest))


def _multiply(blocks: Blocks, instruction: Instruction) -> None:
    found = re.search(r"m64n(\d+)k\d+\.(\w+)\.(\w+)\.(\w+)", instruction.name)
    d, a, b, scale, *flags = instruction.operands
    if found is None or found[2] not in ("s32", "f32") or not {found[3], found[4]} <= SIZES.keys():
        raise NotImplementedError
    columns, out, kind = int(found[1]), found[2], found[3]
    depth = 32 // SIZES[kind]
    in_registers = isinstance(a, tuple)
    # Signs of a and b, then which of them are transposed: only of operands in shared memory.
    if any(flag != 1 for flag in flags[:2]) or (not in_registers and flags[2:3] == [1]):
        raise NotImplementedError
    transposed = flags[-1:] == [1] and len(flags) > 2
    used = frozenset(map(str, d)) | (frozenset(map(str, a)) if isinstance(a, tuple) else frozenset())
    if any(blocks.written.get(each, -1) > blocks.fenced_registers for each in used):
        blocks.faults[f"wgmma without a wgmma.fence after its registers were written: {instruction.text}"] += 1
    groups = blocks.warps // 4
    if isinstance(a, tuple):
        left = _matrix(blocks, a, kind).reshape(len(blocks.blocks), groups, 64, depth)
    else:
        left = _numbers(_operand(blocks, a, 64, depth, SIZES[kind], False, instruction), kind)
    raw = _operand(blocks, b, columns, depth, SIZES[kind], transposed, instruction)
    product = left @ _numbers(raw, kind).swapaxes(2, 3)
    product = product.reshape(len(blocks.blocks), blocks.warps, 16, columns)
    keep = np.broadcast_to(blocks.read(scale, np.dtype(bool)), blocks.shape)[:, ::32, None, None]
    before = dict(blocks.written)
    _store_sums(blocks, d, product + np.where(keep, _sums(blocks, d, out), 0.0), out)
    blocks.written = before
    sums = frozenset(map(str, d))
    none = np.zeros(0, np.int64)
    blocks.products[-1].append((none, none, sums, used - sums))
    blocks.accumulating |= sums
    blocks.feeding |= used - sums


@cache
def _layout(low: int, rows: int, depth: int, size: int, transposed: bool) -> Array:
    """Addresses ``[rows, depth * size]`` of an operand's bytes by its descriptor ("Matrix descriptor format")."""
    start, lead, stride = ((low >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = low >> 62 & 3
    width = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
    if low >> 49 & 7 or (transposed and swizzle == 0):
        raise NotImplementedError
    if transposed:
        row, k, byte = np.ogrid[:rows, :depth, :size]
        per = width // size
        at = start + k % 8 * width + k // 8 * stride + row % per * size + row // per * lead + byte
        at = at.reshape(rows, depth * size)
    else:
        row, byte = np.ogrid[:rows, : depth * size]
        at = start + row // 8 * stride + row % 8 * width + byte // width * lead + byte % width
    return at ^ ((at >> 7 & {0: 0, 1: 7, 2: 3, 3: 1}[swizzle]) << 4)


def _operand(blocks: Blocks, descriptor: Operand, rows: int, depth: int, size: int, transposed: bool,
             instruction: Instruction) -> Array:  # fmt: skip
    """Bytes ``[blocks, warp groups, rows, depth * size]`` from shared memory."""
    shared, count = blocks.shared, len(blocks.blocks)
    values = np.broadcast_to(blocks.read(descriptor, LONG), blocks.shape).reshape(count, -1, 128)
    if (values != values[:1, :, :1]).any():
        raise PtxError(f"threads of a warp group disagree on a descriptor: {instruction.text}")
    parts = []
    for group, bits in enumerate(values[0, :, 0]):
        at = _layout(int(bits), rows, depth, size, transposed)
        if at.max() >= shared.size:
            raise PtxError(f"address outside of the kernel's {shared.size} bytes of shared memory: {instruction.text}")
        places = (np.arange(count)[:, None] * shared.size + at.reshape(-1)).reshape(-1)
        # As of a thread that takes no part in ordinary accesses: another thread's stores need a barrier before.
        thread = np.full(len(places), 128 * group)
        shared.check_read(places, np.full(len(places), 2000), instruction.text)
        shared.fault(shared.unfenced[places], "wgmma reads stores that no fence.proxy.async follows", instruction.text)
        shared.in_use[places] = True
        blocks.products[-1].append((places, thread, frozenset(), frozenset()))
        parts.append(shared.data[places].reshape(count, rows, -1))
    return np.stack(parts, axis=1)
