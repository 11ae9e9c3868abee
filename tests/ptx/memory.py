"""Memory of the emulated GPU, and who may touch which byte when.

Two threads that touch a byte of shared memory with no barrier between them, one of them writing, race: the result
depends on which one is faster. So each byte keeps its last writer and its readers, with the time: a count of barriers
(``bar.sync``, and ``bar.warp.sync`` between threads of one warp). Faults, which are counted by instruction:

- an access after another thread's, one of them a write of another value, without a barrier between them;
- a read of bytes that were never written, or that an unfinished ``cp.async`` writes;
- a write to bytes that an unfinished ``wgmma`` reads or ``cp.async`` writes;
- a ``wgmma`` that reads stores or copies which no ``fence.proxy.async`` has made visible to it.

Global memory reports values that depend on the order of threads or blocks. Addresses out of bounds end the launch.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.program import PtxError

Array = NDArray[Any]
TAGS = 2048  # a tag is ``time * TAGS + thread``
GUARD = 4096  # bytes between tensors


class Shared:
    """Shared memory of several blocks, ``size`` bytes each. ``at`` stands for flat indices of bytes, ``[n * bytes]``,
    in ascending order of threads; ``thread``: the thread within its block of each."""

    def __init__(self, blocks: int, size: int, faults: Counter[str], statistics: Counter[str] | None = None) -> None:
        self.size, self.faults, self.statistics = size, faults, statistics
        total = blocks * size
        self.data = np.full(total, 0xA5, np.uint8)
        # Tags of the last writer; of the reader with the highest number; with the lowest (TAGS - 1 less its number).
        self.writer, self.highest, self.lowest = (np.full(total, -1, np.int32) for _ in range(3))
        self.unfenced = np.zeros(total, bool)  # stores and cp.async since the last fence
        self.copying = np.zeros(total, bool)  # by an unfinished cp.async
        self.in_use = np.zeros(total, bool)  # by an unfinished wgmma
        self.time = self.block_time = 0

    def select(self, blocks: Array) -> Shared:
        """A copy of some of the blocks."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(part, name, value.reshape(-1, self.size)[blocks].reshape(-1))
        return part

    def barrier(self, whole_block: bool) -> None:
        self.time += 1
        if whole_block:
            self.block_time = self.time

    def at(self, block: Array, thread: Array, address: Array, size: int, text: str) -> Array:
        if (address % size).any():
            raise PtxError(f"misaligned address in shared memory: {text}")
        if (address < 0).any() or (address + size > self.size).any():
            raise PtxError(f"address outside of the kernel's {self.size} bytes of shared memory: {text}")
        if self.statistics is not None and len(address):
            self.statistics["wavefronts"] += _wavefronts(block * 1024 + thread, address, size)
        return ((block * self.size + address)[:, None] + np.arange(size)).reshape(-1)

    def fault(self, bad: Array, kind: str, text: str) -> Array:
        if bad.any():
            self.faults[f"{kind}: {text}"] += int(np.count_nonzero(bad))
        return bad

    def _other(self, tag: Array, thread: Array, other: Array) -> Array:
        """Whether the access of ``tag`` by ``other`` may come after one of ``thread`` now."""
        recent = np.where(other // 32 == thread // 32, self.time, self.block_time)
        return (other != thread) & (tag >= recent * TAGS)

    def check_read(self, at: Array, thread: Array, text: str) -> None:
        writer = self.writer[at]
        self.fault(writer < 0, "read of shared memory that was never written", text)
        self.fault(self._other(writer, thread, writer % TAGS), "read races with a write", text)
        self.fault(self.copying[at], "read under an unfinished cp.async", text)

    def note_read(self, at: Array, thread: Array) -> None:
        # Of indices that occur several times, the last assignment counts.
        self.highest[at] = np.maximum(self.highest[at], self.time * TAGS + thread)
        backwards = at[::-1]
        self.lowest[backwards] = np.maximum(self.lowest[backwards], self.time * TAGS + TAGS - 1 - thread[::-1])

    def read(self, at: Array, thread: Array, text: str) -> Array:
        self.check_read(at, thread, text)
        self.note_read(at, thread)
        return self.data[at]

    def check_write(self, at: Array, thread: Array, text: str) -> None:
        high, low = self.highest[at], self.lowest[at]
        raced = self._other(high, thread, high % TAGS) | self._other(low, thread, TAGS - 1 - low % TAGS)
        self.fault(raced, "write races with a read", text)
        self.fault(self.in_use[at], "write under an unfinished wgmma", text)
        self.fault(self.copying[at], "write under an unfinished cp.async", text)

    def write(self, at: Array, values: Array, thread: Array, text: str, copied: bool = False) -> None:
        """``copied``: by a cp.async that has finished; its other checks were made when it was issued."""
        if not copied:
            self.check_write(at, thread, text)
        writer = self.writer[at]
        changed = self.data[at] != values
        self.fault(changed & self._other(writer, thread, writer % TAGS), "write races with a write", text)
        self.data[at] = values
        self.fault(self.data[at] != values, "threads write different values to one byte", text)
        self.writer[at] = self.time * TAGS + thread
        self.unfenced[at] = True


def _wavefronts(thread: Array, address: Array, size: int) -> int:
    """Passes through the 32 banks of 4 bytes: of 32 threads at a time, of 16 with 8 bytes each, of 8 with 16. Each
    takes as many as the busiest bank has different words."""
    words = address[:, None] // 4 + np.arange(max(1, size // 4))
    together = thread // (128 // max(4, size))
    pairs = np.unique(together[:, None] << 32 | words)
    _, passes = np.unique(pairs >> 32, return_inverse=True)
    busy = np.bincount(passes * 32 + pairs % 32, minlength=32 * (passes[-1] + 1))
    return int(busy.reshape(-1, 32).max(axis=1).sum())


class Heap:
    """Global memory: the storages of a launch's tensors with a guard around each; what is not a tensor's is invalid."""

    def __init__(self, faults: Counter[str]) -> None:
        self.faults = faults
        self.data = np.zeros(0, np.uint8)
        self.valid = np.zeros(0, bool)
        self.writer = np.zeros(0, np.int32)  # block that stored last, -1 if none

    def add(self, size: int) -> int:
        """Room for ``size`` bytes; returns its address, a multiple of 512."""
        start = -(-(len(self.data) + GUARD) // 512) * 512
        grown = -(-(start + size + GUARD) // 512) * 512
        self.data, self.valid, self.writer = (
            np.concatenate([old, np.full(grown - len(old), fill, old.dtype)])
            for old, fill in ((self.data, 0xCD), (self.valid, False), (self.writer, -1))
        )
        return start

    def check(self, address: Array, size: int, text: str) -> None:
        if not len(address):
            return
        if (address % size).any():
            raise PtxError(f"misaligned address in global memory: {text}")
        outside = (address < 0) | (address + size > len(self.data))
        if outside.any() or not (self.valid[address] & self.valid[address + size - 1]).all():
            raise PtxError(f"address outside of the tensors: {text}")

    def read(self, address: Array, size: int, block: Array, text: str, ordered: bool) -> Array:
        """Bytes ``[n, size]``. ``ordered``: the blocks have synchronised through atomics."""
        self.check(address, size, text)
        writer = self.writer[address]
        if not ordered and ((writer >= 0) & (writer != block)).any():
            self.faults[f"read of what another block writes: {text}"] += 1
        return self.data.view(f"V{size}")[address // size].view(np.uint8).reshape(len(address), size)

    def write(self, address: Array, values: Array, block: Array, text: str) -> None:
        """``values``: bytes ``[n, size]``."""
        size = values.shape[1]
        self.check(address, size, text)
        at = address[:, None] + np.arange(size)
        differs = (self.data[at] != values).any(axis=1)
        writer = self.writer[address]
        if (differs & (writer >= 0) & (writer != block)).any():
            self.faults[f"blocks store different values at one address: {text}"] += 1
        self.data[at] = values
        if (self.data[at] != values).any():
            self.faults[f"threads store different values at one address: {text}"] += 1
        self.writer[at] = block[:, None]
