"""A driver that stands in for a GPU: Triton's own launches run on CPU tensors, in the emulator.

:func:`emulated` makes it Triton's active driver. Everything before the launch is Triton's: what it specialises on, how
it compiles, its caches. So each kernel runs as the GPU of that compute capability would be given it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from ptx import machine
from ptx.memory import Heap
from ptx.program import Program, PtxError, parse


@cache
def _program(path: Path) -> Program:
    return parse(path.read_text())


class KernelFault(PtxError):
    """A race, or a promise to the hardware that a kernel does not keep."""


class Launcher:
    """What Triton calls for a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata, self.driver = metadata, triton.runtime.driver.active
        kinds = source.signature
        self.runtime = [i for i, name in enumerate(kinds) if kinds[name] != "constexpr"]
        self.floats = [kinds[name] in ("fp32", "f32") for name in kinds]
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
        self.ptx, self.cubin = (Path(files[f"{metadata.name}.{kind}"]) for kind in ("ptx", "cubin"))

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, described: Any, enter: Any,
                 leave: Any, *arguments: Any) -> None:  # fmt: skip
        if self.driver.only_compile:
            sizes = {each.data_ptr(): each.nbytes for each in arguments if isinstance(each, torch.Tensor)}
            self.driver.compiled.append(Launched(self, (x, y, z), sum(sizes.values())))
            return
        program = self.driver.change(_program(self.ptx))
        faults: Counter[str] = Counter()
        heap = Heap(faults)
        tensors: dict[int, tuple[int, torch.Tensor]] = {}
        values = []
        for i in self.runtime:
            value = arguments[i]
            if isinstance(value, torch.Tensor):
                value = _place(heap, tensors, value) if value.numel() else 0
            elif self.floats[i]:
                value = int(np.float32(value).view(np.uint32))
            values.append(int(value))
        values += [0] * (len(program.parameters) - len(values))  # scratch memory, which no kernel has asked for
        named = dict(zip(program.parameters, values, strict=True))
        machine.run(program, heap, named, (x, y, z), self.metadata.shared, faults, self.driver.statistics)
        for address, storage in tensors.values():
            found = torch.from_numpy(heap.data[address : address + len(storage)])
            if not torch.equal(found, storage):
                storage.copy_(found)
        self.driver.finished(program, (x, y, z), faults)


def _place(heap: Heap, tensors: dict[int, tuple[int, torch.Tensor]], tensor: torch.Tensor) -> int:
    """The tensor's address; its storage is copied in once, and its own bytes count as valid."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in tensors:
        raw = torch.empty(0, dtype=torch.uint8).set_(storage)
        address = heap.add(len(raw))
        heap.data[address : address + len(raw)] = raw.numpy()
        tensors[storage.data_ptr()] = address, raw
    start = tensors[storage.data_ptr()][0] + tensor.storage_offset() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    heap.valid[start : start + (last + 1) * tensor.element_size()] = True
    return start


@dataclass(frozen=True)
class Launched:
    """A launch that was compiled only: its kernel, its grid, and the bytes of its tensors, each
    once."""

    kernel: Launcher
    grid: tuple[int, int, int]
    nbytes: int


class _Utils:
    """``CudaUtils``: what Triton asks of a device."""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return None, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class EmulatedDriver:
    """``architecture``: compute capability, 90 for 9.0. ``change``: what is done to a program before each launch.

    ``faults`` holds what the launches so far have done wrong. ``strict``: raise :class:`KernelFault` at once.
    ``only_compile``: launches run nothing and are kept in ``compiled``.
    ``statistics``: a counter to count wavefronts in.
    """

    launcher_cls = Launcher

    def __init__(self, architecture: int, strict: bool = True) -> None:
        self.architecture, self.strict, self.only_compile = architecture, strict, False
        self.compiled: list[Launched] = []
        self.statistics: Counter[str] | None = None
        self.utils = _Utils()
        self.change: Callable[[Program], Program] = lambda program: program
        self.faults: Counter[str] = Counter()

    def finished(self, program: Program, grid: tuple[int, int, int], faults: Counter[str]) -> None:
        self.faults.update({f"{program.name}: {fault}": count for fault, count in faults.items()})
        if self.strict and faults:
            raise KernelFault(f"{program.name}, grid {grid}: {'; '.join(list(faults)[:5])}")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextlib.contextmanager
def emulated(architecture: int, strict: bool = True) -> Iterator[EmulatedDriver]:
    """Run launches on a GPU of compute capability ``architecture`` that is not there."""
    config = triton.runtime.driver
    previous = config._active  # there may be none: then ``config.active`` would look for a GPU
    stand_in = EmulatedDriver(architecture, strict)
    config.set_active(stand_in)
    try:
        yield stand_in
    finally:
        config.set_active(previous)
