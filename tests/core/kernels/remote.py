"""The native library in another process: code of another processor under an emulator, or instructions counted.

:func:`build` compiles the library and a driver (``native_driver/``) into one program; :class:`RemoteLibrary` stands in
for the ``ctypes.CDLL`` of ``cpu.py`` and copies the memory that a call reads and writes to and from a shared file.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path

from robuq_core.kernels.cpu import _BlockStruct, _LayerStruct, _PrologueStruct

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "robuq_core/kernels/native"
DRIVER = HERE / "native_driver"
ARM_COMPILER, ARM_EMULATOR = ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")
# As setup.py builds it.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-Wno-psabi", "-Wall", "-Wextra"]

# In the order of driver.c.
_FUNCTIONS = (
    *("robuq_interface", "robuq_supports", "robuq_open", "robuq_close", "robuq_rotate_quantize"),
    *("robuq_ternary_linear", "robuq_ternary", "robuq_attention", "robuq_block", "robuq_linear"),
    *("robuq_planar_from_base3", "robuq_weight_counts"),
)
_ARGUMENTS, _ARENA = 10, 1 << 28


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)


def build(folder: Path, compiler: str, flags: Sequence[str] = ()) -> Path:
    """The driver for the processor that ``compiler`` builds for, statically linked, in ``folder``."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = run([compiler, *FLAGS, "-Werror", *flags, "-c", source, "-o", target])
        assert done.returncode == 0, done.stderr
        return target

    sources = [path for path in sorted(NATIVE.glob("*.c")) if path.name != "extension.c"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, DRIVER / "driver.c"]))
    done = run([compiler, "-static", "-pthread", *objects, "-lm", "-o", folder / "driver"])
    assert done.returncode == 0, done.stderr
    return folder / "driver"


def missing(*tools: tuple[str, str]) -> str | None:
    """What a test that needs these programs, each with its Debian package, is skipped for."""
    for tool, package in tools:
        if not shutil.which(tool):
            return f"{tool} is not installed (Debian: {package})"
    return None


def _in_turn(call: Callable[..., int]) -> Callable[..., int]:
    """One call at a time: the file is shared by all."""

    @wraps(call)
    def wait(library: RemoteLibrary, *arguments: int) -> int:
        with library.turn:
            while library.closed:
                library._call("robuq_close", library.closed.pop())
            return call(library, *arguments)

    return wait


class RemoteLibrary:
    """The functions of :func:`robuq_core.kernels.cpu.open_library`, run by ``command``, a driver."""

    def __init__(self, command: Sequence[str | Path], folder: Path) -> None:
        path = folder / "arena"
        with path.open("wb") as file:
            file.truncate(_ARENA)
        with path.open("r+b") as file:
            self._arena = mmap.mmap(file.fileno(), _ARENA)
        self._process = subprocess.Popen(
            [*map(str, command), str(path), str(_ARENA)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._base, self._used = self._answer(), 0
        self.turn, self.closed = threading.Lock(), list[int]()

    def close(self) -> str:
        """Ends the process; what it wrote to standard error."""
        _, errors = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, errors.decode()
        return errors.decode()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        raw = self._process.stdout.read(8)
        if len(raw) < 8:
            self._process.wait(timeout=60)
            raise AssertionError(f"the driver ended ({self._process.returncode}): {self._process.stderr.read()!r}")  # type: ignore[union-attr]
        return int(struct.unpack("<q", raw)[0])

    def _call(self, name: str, *arguments: int) -> int:
        assert self._process.stdin is not None
        padded = [*arguments, *[0] * (_ARGUMENTS - len(arguments))]
        self._process.stdin.write(struct.pack(f"<{_ARGUMENTS + 1}q", _FUNCTIONS.index(name), *padded))
        self._process.stdin.flush()
        answer = self._answer()
        return answer if name == "robuq_open" else ctypes.c_int32(answer & 0xFFFFFFFF).value

    def _copied(self, address: int | None, size: int) -> int:
        """The address there of a copy of ``size`` bytes at ``address`` here."""
        if not address:
            return 0
        offset = self._used
        self._used += -(-size // 64) * 64 + 64
        assert self._used <= _ARENA
        self._arena[offset : offset + size] = ctypes.string_at(address, size)
        return self._base + offset

    def _copied_layer(self, address: int) -> tuple[_LayerStruct, int]:
        layer = _LayerStruct.from_address(address)
        there = _LayerStruct.from_buffer_copy(layer)
        width, channels, rank = layer.width, layer.channels, layer.rank
        for name, size in {
            **{"planar": channels * -(-width // 128) * 32, "signs": 4 * width, "base_matrix": 4 * layer.base**2},
            **{
                "alpha": 4 * channels,
                "bias": 4 * channels,
                "weight_counts": 8 * channels,
                "lowrank_a": 2 * channels * rank,
            },
            "lowrank_b": 2 * width * rank,
        }.items():
            setattr(there, name, self._copied(getattr(layer, name), size))
        return layer, self._copied(ctypes.addressof(there), ctypes.sizeof(there))

    def _copied_prologue(self, address: int, rows: int, width: int) -> int:
        prologue = _PrologueStruct.from_address(address)
        there = _PrologueStruct.from_buffer_copy(prologue)
        if prologue.shift:
            images = rows // prologue.rows_per_image
            for name in ("shift", "scale"):
                stride = getattr(prologue, f"{name}_stride")
                setattr(there, name, self._copied(getattr(prologue, name), 4 * ((images - 1) * stride + width)))
        return self._copied(ctypes.addressof(there), ctypes.sizeof(there))

    def _run(
        self, name: str, arguments: Sequence[int], outputs: Sequence[tuple[int, int]], at: int | None = None
    ) -> int:
        """Calls ``name``; memory of each ``(address, size)`` of ``outputs`` is copied there and back. They come last,
        or in place of ``arguments[at:]``."""
        there = [self._copied(*output) for output in outputs]
        at = len(arguments) if at is None else at
        answer = self._call(name, *arguments[:at], *there, *arguments[at + len(there) :])
        for (address, size), copy in zip(outputs, there, strict=True):
            ctypes.memmove(address, self._arena[copy - self._base : copy - self._base + size], size)
        self._used = 0
        return answer

    @_in_turn
    def robuq_supports(self, isa: int) -> int:
        return self._call("robuq_supports", isa)

    @_in_turn
    def robuq_open(self, isa: int, threads: int) -> int:
        return self._call("robuq_open", isa, threads)

    def robuq_close(self, handle: int) -> None:
        self.closed.append(handle)  # by the next call: a finaliser may run in the middle of one

    @_in_turn
    def robuq_rotate_quantize(
        self, handle: int, layer: int, x: int, rows: int, prologue: int, codes: int, scales: int, lowrank: int
    ) -> int:
        of, layer = self._copied_layer(layer)
        return self._run(
            "robuq_rotate_quantize",
            [
                handle,
                layer,
                self._copied(x, 4 * rows * of.width),
                rows,
                self._copied_prologue(prologue, rows, of.width),
            ],
            [(codes, rows * of.width), (scales, 4 * rows), (lowrank, 4 * rows * of.rank)],
        )

    @_in_turn
    def robuq_ternary_linear(
        self, handle: int, layer: int, codes: int, scales: int, lowrank: int, rows: int, y: int
    ) -> int:
        of, layer = self._copied_layer(layer)
        inputs = [self._copied(codes, rows * of.width), self._copied(scales, 4 * rows)]
        inputs.append(self._copied(lowrank, 4 * rows * of.rank))
        return self._run("robuq_ternary_linear", [handle, layer, *inputs, rows], [(y, 4 * rows * of.channels)])

    @_in_turn
    def robuq_ternary(
        self, handle: int, layer: int, x: int, rows: int, prologue: int, gate: int, stride: int, per_image: int, y: int
    ) -> int:
        of, layer = self._copied_layer(layer)
        before = self._copied_prologue(prologue, rows, of.width)
        gate = self._copied(gate, 4 * ((-(-rows // per_image) - 1) * stride + of.channels))
        x = self._copied(x, 4 * rows * of.width)
        arguments = [handle, layer, x, rows, before, gate, stride, per_image]
        return self._run("robuq_ternary", arguments, [(y, 4 * rows * of.channels)])

    @_in_turn
    def robuq_attention(
        self, handle: int, qkv: int, images: int, length: int, width: int, heads: int, quantized: int, out: int
    ) -> int:
        size = 4 * images * length * width
        arguments = [handle, self._copied(qkv, 3 * size), images, length, width, heads, int(quantized)]
        return self._run("robuq_attention", arguments, [(out, size)])

    @_in_turn
    def robuq_block(
        self, handle: int, block: int, x: int, images: int, length: int, modulation: int, entry: int, stride: int
    ) -> int:
        there = _BlockStruct.from_buffer_copy(_BlockStruct.from_address(block))
        for name in ("qkv", "proj", "fc1", "fc2"):
            of, layer = self._copied_layer(getattr(there, name))
            setattr(there, name, layer)
        block = self._copied(ctypes.addressof(there), ctypes.sizeof(there))
        width = of.channels
        modulation = self._copied(modulation, 4 * (5 * entry + (images - 1) * stride + width))
        arguments = [handle, block, 0, images, length, modulation, entry, stride]
        return self._run("robuq_block", arguments, [(x, 4 * images * length * width)], at=2)

    @_in_turn
    def robuq_linear(
        self, handle: int, x: int, weight: int, bias: int, rows: int, width: int, channels: int, y: int
    ) -> int:
        inputs = [self._copied(x, 4 * rows * width), self._copied(weight, 4 * channels * width)]
        inputs += [self._copied(bias, 4 * channels), rows, width, channels]
        return self._run("robuq_linear", [handle, *inputs], [(y, 4 * rows * channels)])

    @_in_turn
    def robuq_planar_from_base3(self, packed: int, rows: int, width: int, planar: int) -> int:
        packed = self._copied(packed, -(-rows * width // 5))
        return self._run("robuq_planar_from_base3", [packed, rows, width], [(planar, rows * -(-width // 128) * 32)])

    @_in_turn
    def robuq_weight_counts(self, planar: int, channels: int, row_bytes: int, counts: int) -> int:
        arguments = [self._copied(planar, channels * row_bytes), channels, row_bytes]
        return self._run("robuq_weight_counts", arguments, [(counts, 8 * channels)])


def collected(errors: str) -> int:
    """The number of instructions that callgrind or the plugin of qemu reports."""
    found = re.search(r"Collected : (\d+)", errors)
    assert found, errors
    return int(found[1])
