"""Runs a PTX program: all threads of several blocks in lock step, with numpy (PTX ISA, chapter "Instruction set").

A register is an array ``[blocks, threads]`` of bits. Blocks that take different branches are split into groups of their
own; threads of one block must branch together, as they do in Triton's code without warp specialisation.

Arithmetic is exact IEEE, rounded once: ``fma`` in float64 and then to float32, and so are the approximate functions
(``ex2.approx``, ``div.full`` ...), whose last bits differ on a GPU. Subnormals are kept where
``.ftz`` would flush them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ptx import tensor_cores
from ptx.memory import Array, Heap, Shared
from ptx.program import Address, Instruction, Operand, Program, PtxError

LIMIT = 5_000_000  # instructions of one group of blocks: a loop that does not end
INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}") for kind in "sub" for bits in (8, 16, 32, 64)
}
FLOATS = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "f16": np.dtype(np.float16)}


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """To the nearest, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


@cache
def constant(bits: int, dtype: np.dtype[Any]) -> Array:
    if dtype == np.bool_:
        return np.array(bool(bits))
    size = dtype.itemsize
    return np.frombuffer((bits % (1 << 8 * size)).to_bytes(size, "little"), dtype)[0:1].reshape(())


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}
UNARY: dict[str, Callable[[Any], Any]] = {
    **{"abs": np.abs, "neg": np.negative, "not": np.invert, "sqrt": np.sqrt, "ex2": np.exp2},
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    **{"max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum},  # alike for integers
}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class Blocks:
    """Some blocks of a launch, at one instruction."""

    def __init__(self, program: Program, heap: Heap, arguments: dict[str, int], blocks: Array, grid: tuple[int, ...],
                 shared: int, faults: Counter[str], statistics: Counter[str] | None) -> None:  # fmt: skip
        self.program, self.heap, self.arguments, self.faults = program, heap, arguments, faults
        self.blocks, self.shape = blocks, (len(blocks), program.threads)
        self.shared = Shared(len(blocks), shared, faults, statistics)
        self.registers: dict[str, Array] = {}
        self.pc = self.steps = 0
        self.ordered = False  # through an atomic operation
        # Groups of cp.async: bytes, values, threads; of wgmma: bytes, threads, sums, first operand. The last is open.
        self.copies: list[list[tuple[Any, ...]]] = [[]]
        self.products: list[list[tuple[Any, ...]]] = [[]]
        self.accumulating: frozenset[str] = frozenset()
        self.feeding: frozenset[str] = frozenset()
        self.written: dict[str, int] = {}  # step at which a register was last written, but for by wgmma
        self.fenced_registers = -1
        thread = np.arange(program.threads)
        self.specials: dict[str, Array] = {
            **{"%tid.x": thread, "%tid.y": thread * 0, "%tid.z": thread * 0, "%laneid": thread % 32},
            **{"%ntid.x": np.array(program.threads), "%ntid.y": np.array(1), "%ntid.z": np.array(1)},
        }
        for i, axis in enumerate("xyz"):
            self.specials[f"%ctaid.{axis}"] = (blocks // int(np.prod(grid[:i])) % grid[i])[:, None]
            self.specials[f"%nctaid.{axis}"] = np.array(grid[i])
        self._number_threads()

    def _number_threads(self) -> None:
        count, threads = self.shape
        self.block = np.repeat(np.arange(count), threads)  # of each thread, within this group
        self.thread = np.tile(np.arange(threads), count)
        self.warps = threads // 32

    def select(self, chosen: Array, pc: int) -> Blocks:
        """Some of the blocks, to continue at ``pc``."""
        part = object.__new__(Blocks)
        part.__dict__.update(self.__dict__)
        part.pc, part.blocks, part.shape = pc, self.blocks[chosen], (int(chosen.sum()), self.shape[1])
        part.registers = {name: value[chosen] for name, value in self.registers.items()}
        part.written = dict(self.written)
        part.specials = {k: v[chosen] if v.ndim == 2 else v for k, v in self.specials.items()}
        part.shared = self.shared.select(chosen)
        # Unfinished copies and products of these blocks, by their new places in shared memory.
        size, renumbered = self.shared.size, np.cumsum(chosen) - 1

        def moved(places: Array, *values: Any) -> tuple[Any, ...]:
            kept = chosen[places // size]
            at = renumbered[places[kept] // size] * size + places[kept] % size
            return (at, *(value[kept] if isinstance(value, np.ndarray) else value for value in values))

        part.copies = [[moved(*each) for each in group] for group in self.copies]
        part.products = [[moved(*each) for each in group] for group in self.products]
        part._number_threads()
        return part

    def run(self) -> list[Blocks]:
        """To the end, or to a branch that blocks take apart: then both parts."""
        code = self.program.instructions
        with np.errstate(all="ignore"):
            while self.pc < len(code):
                instruction = code[self.pc]
                self.pc += 1
                self.steps += 1
                mask: Array | None = None
                if instruction.guard is not None:
                    mask = self.read(instruction.guard[0], np.dtype(bool)) ^ instruction.guard[1]
                    if mask.all():
                        mask = None
                    elif not mask.any():
                        continue
                if instruction.parts[0] in ("bra", "ret"):
                    ends = instruction.parts[0] == "ret"
                    target = len(code) if ends else self.program.labels[str(instruction.operands[0])]
                    if mask is not None:
                        taken = np.broadcast_to(mask, self.shape)
                        if (taken != taken[:, :1]).any():
                            raise PtxError(f"threads of one block branch apart: {instruction.text}")
                        return [self.select(taken[:, 0], target), self.select(~taken[:, 0], self.pc)]
                    self.pc = target
                    continue
                if self.steps > LIMIT:
                    raise PtxError(f"no end after {LIMIT} instructions: {instruction.text}")
                self._execute(instruction, mask)
        return []

    def _execute(self, instruction: Instruction, mask: Array | None) -> None:
        kind = instruction.parts[0]
        if self.accumulating and kind != "wgmma":
            touched = self.accumulating & instruction.registers
            changed = self.feeding & frozenset(_targets(instruction))
            if touched or changed:
                self.faults[f"register of an unfinished wgmma: {instruction.text}"] += 1
        try:
            getattr(self, f"_{kind}", self._arithmetic)(instruction, mask)
        except (KeyError, NotImplementedError):
            raise PtxError(f"unsupported PTX instruction {instruction.name}: {instruction.text}") from None

    # Registers

    def read(self, operand: Operand, dtype: np.dtype[Any]) -> Array:
        """As ``dtype``, ``[blocks, threads]`` or what broadcasts to that. What was never written has any bits."""
        if isinstance(operand, int):
            return constant(operand, dtype)
        value = self.registers.get(operand)
        if value is None:
            special = self.specials.get(operand)
            if special is not None:
                return special.astype(dtype)
            return constant(0xDEADBEEFDEADBEEF, np.dtype(self.program.width(operand))).astype(dtype)
        if value.dtype == dtype:
            return value
        if value.dtype.itemsize == dtype.itemsize and dtype != np.bool_ and value.dtype != np.bool_:
            return value.view(dtype)
        return value.astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, register: Operand, value: Array, mask: Array | None = None) -> None:
        """A narrower value is extended, by its sign if it has one."""
        if register == "_":
            return
        name = str(register)
        width = np.dtype(self.program.width(name))
        if value.dtype != width:
            if value.dtype.kind == "f":
                value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
            value = value.astype(width, copy=False)
        if mask is not None:
            value = np.where(mask, value, self.read(name, width))
        if value.shape != self.shape:
            value = np.broadcast_to(value, self.shape).copy()
        self.registers[name] = value
        self.written[name] = self.steps

    def floats(self, operand: Operand, kind: str) -> Array:
        """Values of a register of floats, float32 for bfloat16; of two in one register with a last axis."""
        if kind in FLOATS:
            return self.read(operand, FLOATS[kind])
        if kind == "bf16":
            return from_bfloat16(self.read(operand, np.dtype(np.uint16)))
        both = np.broadcast_to(self.read(operand, np.dtype(np.uint32)), self.shape)
        halves = np.ascontiguousarray(both).view(np.uint16).reshape(*self.shape, 2)
        return halves.view(np.float16) if kind == "f16x2" else from_bfloat16(halves)

    def write_floats(self, register: Operand, value: Array, kind: str, mask: Array | None) -> None:
        if kind in FLOATS:
            value = value.astype(FLOATS[kind], copy=False)
        elif kind == "f16x2":
            value = np.ascontiguousarray(value.astype(np.float16)).view(np.uint32)[..., 0]
        else:
            value = to_bfloat16(value)
            value = np.ascontiguousarray(value).view(np.uint32)[..., 0] if kind == "bf16x2" else value
        self.write(register, value, mask)

    # Arithmetic

    def _arithmetic(self, instruction: Instruction, mask: Array | None) -> None:
        name, kind, operands = instruction.parts[0], instruction.parts[-1], instruction.operands
        if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
            values = [self.floats(operand, kind) for operand in operands[1:]]
            result = _of_floats(f"{name}.NaN" if "NaN" in instruction.parts else name, values)
        elif kind == "pred" or kind in INTEGERS:
            dtype = np.dtype(bool) if kind == "pred" else INTEGERS[kind]
            result = self._of_integers(name, instruction, dtype)
        elif kind in ("s16x2", "u16x2"):
            words = (np.broadcast_to(self.read(each, INTEGERS["u32"]), self.shape) for each in operands[1:])
            halves = [np.ascontiguousarray(each).view(np.int16 if kind[0] == "s" else np.uint16) for each in words]
            return self.write(operands[0], np.ascontiguousarray(BINARY[name](*halves)).view(np.uint32), mask)
        else:
            raise NotImplementedError
        if kind in INTEGERS or kind == "pred":
            self.write(operands[0], np.asarray(result), mask)
        else:
            self.write_floats(operands[0], np.asarray(result), kind, mask)
        return None

    def _of_integers(self, name: str, instruction: Instruction, dtype: np.dtype[Any]) -> Array:
        operands = instruction.operands[1:]
        if name in ("mul", "mad"):
            return self._product(instruction, dtype)
        if name == "bfi":  # insert the low bits of the first into the second
            low, into = self.read(operands[0], dtype), self.read(operands[1], dtype)
            position, length = (self.read(each, INTEGERS["u32"]) & 255 for each in operands[2:])
            ones = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(dtype) << position.astype(dtype)
            return into & ~ones | (low << position.astype(dtype)) & ones
        if name == "selp":
            chosen = self.read(operands[2], np.dtype(bool))
            return np.where(chosen, self.read(operands[0], dtype), self.read(operands[1], dtype))
        if name in ("shl", "shr", "bfe"):
            return self._shifted(name, operands, dtype)
        values = [self.read(operand, dtype) for operand in operands]
        if name in UNARY:
            return np.asarray(UNARY[name](values[0]))
        if name in ("div", "rem"):  # towards zero
            a, b = values
            quotient = a // b
            quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(dtype)
            return np.asarray(quotient if name == "div" else a - quotient * b)
        if name == "prmt":
            return _permuted(*(np.asarray(value, np.uint64) for value in values))
        return np.asarray(BINARY[name](*values))

    def _product(self, instruction: Instruction, dtype: np.dtype[Any]) -> Array:
        a, b = (self.read(operand, dtype) for operand in instruction.operands[1:3])
        part = instruction.parts[1]
        if part == "wide":
            dtype = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            result = a.astype(dtype) * b.astype(dtype)
        else:
            result = a * b
        if instruction.parts[0] == "mad":
            result = result + self.read(instruction.operands[3], dtype)
        return np.asarray(result)

    def _shifted(self, name: str, operands: tuple[Operand, ...], dtype: np.dtype[Any]) -> Array:
        value, bits = self.read(operands[0], dtype), 8 * dtype.itemsize
        if name == "bfe":
            # To the top, and back with the sign or zeros.
            first, length = (np.minimum(self.read(each, INTEGERS["u32"]) & 255, bits) for each in operands[1:])
            length = np.minimum(length, bits - first)
            up = (bits - first - length).astype(dtype)
            down = (bits - length).astype(dtype)
            return np.where(length > 0, (value << up) >> down, np.zeros_like(value))
        distance = self.read(operands[1], INTEGERS["u32"])
        near = np.minimum(distance, bits - 1).astype(dtype)
        if name == "shr":
            rest = np.zeros_like(value) if dtype.kind == "u" else value >> dtype.type(bits - 1)
            return np.where(distance < bits, value >> near, rest)
        return np.where(distance < bits, value << near, np.zeros_like(value))

    def _mov(self, instruction: Instruction, mask: Array | None) -> None:
        target, source = instruction.operands
        kind = instruction.parts[-1]
        dtype = np.dtype(bool) if kind == "pred" else INTEGERS.get(kind) or FLOATS[kind]
        if isinstance(target, tuple):  # the low part first
            part = np.dtype(f"u{dtype.itemsize // len(target)}")
            whole = np.broadcast_to(self.read(source, dtype), self.shape)
            parts = np.ascontiguousarray(whole).view(part).reshape(*self.shape, len(target))
            for i, each in enumerate(target):
                self.write(each, np.ascontiguousarray(parts[..., i]), mask)
        elif isinstance(source, tuple):
            part = np.dtype(f"u{dtype.itemsize // len(source)}")
            parts = [np.broadcast_to(self.read(each, part), self.shape) for each in source]
            self.write(target, np.stack(parts, axis=-1).view(dtype)[..., 0], mask)
        else:
            self.write(target, self.read(source, dtype), mask)
            # A copy: the compiler renames accumulators between wgmma.fence and wgmma, which ptxas undoes.
            self.written[str(target)] = self.written.get(source, -1) if isinstance(source, str) else -1

    def _selp(self, instruction: Instruction, mask: Array | None) -> None:
        dtype = np.dtype(f"u{int(instruction.parts[-1][1:]) // 8}")
        self.write(instruction.operands[0], self._of_integers("selp", instruction, dtype), mask)

    def _setp(self, instruction: Instruction, mask: Array | None) -> None:
        comparison, kind = instruction.parts[1], instruction.parts[-1]
        if len(instruction.operands) != 3:
            raise NotImplementedError
        if kind in INTEGERS:
            a, b = (self.read(each, INTEGERS[kind]) for each in instruction.operands[1:])
            result = COMPARE[comparison](a, b)
        else:
            a, b = (self.floats(each, kind) for each in instruction.operands[1:])
            unordered = np.isnan(a) | np.isnan(b)
            if comparison in ("num", "nan"):
                result = unordered if comparison == "nan" else ~unordered
            elif comparison.endswith("u") and comparison != "u":
                result = COMPARE[comparison[:-1]](a, b) | unordered
            else:
                result = COMPARE[comparison](a, b) & ~unordered
        self.write(instruction.operands[0], np.asarray(result), mask)

    def _cvt(self, instruction: Instruction, mask: Array | None) -> None:
        target, source = instruction.parts[-2:]
        first, *others = instruction.operands[1:]
        rounding = next((ROUND[part] for part in instruction.parts if part in ROUND), None)
        if others:  # two floats into one register, the second one into its low half
            value = np.stack(np.broadcast_arrays(*(self.floats(each, source) for each in (*others, first))), axis=-1)
            value = np.broadcast_to(value, (*self.shape, 2))
        elif source in INTEGERS:
            value = self.read(first, INTEGERS[source])
        else:
            value = self.floats(first, source)
        if target in INTEGERS:
            if value.dtype.kind == "f":
                limits = np.iinfo(INTEGERS[target])
                value = np.nan_to_num((rounding or np.rint)(value.astype(np.float64)), nan=0.0)
                small = np.clip(value, limits.min, limits.max).astype(INTEGERS[target])
                value = np.where(value >= limits.max, limits.max, small)
            self.write(instruction.operands[0], value.astype(INTEGERS[target]), mask)
        else:
            self.write_floats(instruction.operands[0], rounding(value) if rounding else value, target, mask)

    # Between threads

    def _shfl(self, instruction: Instruction, mask: Array | None) -> None:
        mode = instruction.parts[2]
        value = np.broadcast_to(self.read(instruction.operands[1], INTEGERS["u32"]), self.shape)
        by, limits = (self.read(each, INTEGERS["u32"]).astype(np.int64) for each in instruction.operands[2:4])
        lane = np.arange(self.shape[1]) % 32
        segment, last = limits >> 8 & 31, limits & 31
        from_lane = {"bfly": lane ^ by, "idx": lane & segment | by & ~segment}[mode]
        inside = from_lane <= (lane & segment | last & ~segment)
        from_lane = np.where(inside, from_lane, lane) + np.arange(self.shape[1]) // 32 * 32
        self.write(instruction.operands[0], np.take_along_axis(value, np.broadcast_to(from_lane, self.shape), 1), mask)

    def _bar(self, instruction: Instruction, mask: Array | None) -> None:
        whole = instruction.parts[1] != "warp"
        if whole and (len(instruction.operands) > 1 or mask is not None):
            raise NotImplementedError  # a barrier of some threads
        self.shared.barrier(whole)

    _barrier = _bar

    def _fence(self, instruction: Instruction, mask: Array | None) -> None:
        if "proxy" in instruction.parts:
            self.shared.unfenced[:] = False

    _membar = _fence

    # Memory

    def _active(self, address: Address, mask: Array | None) -> tuple[Array, Array, Array, Array | slice]:
        """Addresses, blocks and threads of the threads that take part, and which those are."""
        base = np.broadcast_to(self.read(address.base, INTEGERS["u64"]), self.shape).reshape(-1).astype(np.int64)
        chosen = slice(None) if mask is None else np.broadcast_to(mask, self.shape).reshape(-1)
        at = base[chosen] + address.offset
        if isinstance(address.base, str) and self.program.width(address.base) is np.uint32:
            at &= 0xFFFFFFFF  # a register that is a negative offset, in its 32 bits
        return at, self.block[chosen], self.thread[chosen], chosen

    def _ld(self, instruction: Instruction, mask: Array | None) -> None:
        target, address = instruction.operands[:2]
        if instruction.parts[1] == "param":
            return self.write(target, constant(self.arguments[str(address.base)], INTEGERS["u64"]))
        targets = target if isinstance(target, tuple) else (target,)
        kind = instruction.parts[-1]
        dtype = INTEGERS.get(kind) or FLOATS[kind]
        size = dtype.itemsize * len(targets)
        at, block, thread, chosen = self._active(address, mask)
        if instruction.parts[1].startswith("shared"):
            places = self.shared.at(block, thread, at, size, instruction.text)
            found = self.shared.read(places, np.repeat(thread, size), instruction.text).reshape(-1, size)
        elif instruction.parts[1] == "global":
            found = self.heap.read(at, size, self.blocks[block], instruction.text, self.ordered)
        else:
            raise NotImplementedError
        values = np.zeros((self.shape[0] * self.shape[1], size), np.uint8)
        values[chosen] = found
        for i, each in enumerate(targets):
            part = np.ascontiguousarray(values[:, i * dtype.itemsize : (i + 1) * dtype.itemsize]).view(dtype)
            self.write(each, part.reshape(self.shape), mask)
        return None

    def _st(self, instruction: Instruction, mask: Array | None) -> None:
        address, source = instruction.operands[:2]
        sources = source if isinstance(source, tuple) else (source,)
        kind = instruction.parts[-1]
        dtype = INTEGERS.get(kind) or FLOATS[kind]
        parts = [np.broadcast_to(self.read(each, dtype), self.shape) for each in sources]
        values = np.stack(parts, axis=-1).view(np.uint8).reshape(self.shape[0] * self.shape[1], -1)
        at, block, thread, chosen = self._active(address, mask)
        values = values[chosen]
        size = values.shape[1]
        if instruction.parts[1].startswith("shared"):
            places = self.shared.at(block, thread, at, size, instruction.text)
            self.shared.write(places, values.reshape(-1), np.repeat(thread, size), instruction.text)
        elif instruction.parts[1] == "global":
            self.heap.write(at, values, self.blocks[block], instruction.text)
        else:
            raise NotImplementedError

    def _atom(self, instruction: Instruction, mask: Array | None) -> None:
        """A sum of integers, one thread after the other. Sums of floats have no fixed order."""
        target, address, source = instruction.operands
        kind = instruction.parts[-1]
        if not {"global", "add"} <= set(instruction.parts) or kind not in INTEGERS:
            raise NotImplementedError
        dtype = INTEGERS[kind]
        at, _, _, chosen = self._active(address, mask)
        self.heap.check(at, dtype.itemsize, instruction.text)
        values = np.broadcast_to(self.read(source, dtype), self.shape).reshape(-1)[chosen]
        old, memory = np.zeros(self.shape[0] * self.shape[1], dtype), self.heap.data.view(dtype)
        for thread, place, value in zip(np.arange(len(old))[chosen], at // dtype.itemsize, values, strict=True):
            old[thread] = memory[place]
            memory[place] += value
        self.write(target, old.reshape(self.shape), mask)
        self.ordered = True

    def _cp(self, instruction: Instruction, mask: Array | None) -> None:
        if instruction.parts[1] != "async" or "bulk" in instruction.parts or "mbarrier" in instruction.parts:
            raise NotImplementedError
        if instruction.parts[2] == "commit_group":
            self.copies.append([])
            return
        if instruction.parts[2] == "wait_group":
            pending = int(instruction.operands[0])
            # The last entry is of copies that are not committed.
            while len(self.copies) - 1 > pending:
                for places, values, thread in self.copies.pop(0):
                    self.shared.copying[places] = False
                    self.shared.write(places, values, thread, instruction.text, copied=True)
            return
        target, source = instruction.operands[:2]
        size = int(instruction.operands[2])
        at, block, thread, chosen = self._active(target, mask)
        wanted = np.full(self.shape, size)
        if len(instruction.operands) > 3:
            wanted = np.broadcast_to(self.read(instruction.operands[3], INTEGERS["u32"]), self.shape)
        wanted = wanted.reshape(-1)[chosen]
        if not np.isin(wanted, (0, size)).all():
            raise NotImplementedError  # a copy of a part
        values = np.zeros((len(at), size), np.uint8)
        origin = self._active(source, mask)[0]
        full = wanted == size
        values[full] = self.heap.read(origin[full], size, self.blocks[block[full]], instruction.text, self.ordered)
        places, threads = self.shared.at(block, thread, at, size, instruction.text), np.repeat(thread, size)
        self.shared.check_write(places, threads, instruction.text)
        self.shared.copying[places] = True
        self.copies[-1].append((places, values.reshape(-1), threads))

    _ldmatrix = tensor_cores.load_matrix
    _stmatrix = tensor_cores.store_matrix
    _mma = tensor_cores.multiply_in_warp
    _wgmma = tensor_cores.wgmma


def _targets(instruction: Instruction) -> tuple[str, ...]:
    """Registers that an instruction writes, if it writes any."""
    if not instruction.operands or instruction.parts[0] in ("st", "red", "stmatrix", "cp", "bar", "fence"):
        return ()
    first = instruction.operands[0]
    return first if isinstance(first, tuple) else (first,) if isinstance(first, str) else ()


def _of_floats(name: str, values: list[Array]) -> Array:
    dtype = np.result_type(*values)
    if name == "fma":
        a, b, c = (value.astype(np.float64) for value in values)
        return np.asarray(a * b + c).astype(dtype)
    if name in ("mul", "div"):
        return np.asarray((np.multiply if name == "mul" else np.divide)(*values))
    if name in BINARY:
        return np.asarray(BINARY[name](*values))
    wide = values[0] if name in ("abs", "neg") else values[0].astype(np.float64)
    return np.asarray(UNARY[name](wide)).astype(dtype)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of ``a`` (0..3) and ``b`` (4..7) by four digits; a digit's top bit asks for the byte's sign."""
    both, result = a | b << np.uint64(32), np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint64)
    for i in range(4):
        digit = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def run(program: Program, heap: Heap, arguments: dict[str, int], grid: tuple[int, int, int], shared: int,
        faults: Counter[str], statistics: Counter[str] | None = None, at_once: int = 4096) -> None:  # fmt: skip
    """All blocks of a launch, about ``at_once`` threads at a time. ``statistics``: counts passes through shared memory
    ("wavefronts") of all blocks together."""
    total = int(np.prod(grid))
    step = max(1, at_once // program.threads)
    for first in range(0, total, step):
        blocks = np.arange(first, min(total, first + step))
        waiting = [Blocks(program, heap, arguments, blocks, grid, shared, faults, statistics)]
        while waiting:
            waiting += reversed(waiting.pop().run())
