"""How a kernel is launched: its tile sizes, its warps, its pipeline stages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

# Shared memory a block may use, bytes, by compute capability (CUDA C programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class LaunchConfig:
    """``blocks``: the kernel's tile sizes by name. ``num_stages``: buffers of its software pipeline. ``max_registers``
    per thread: None for no limit."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    def options(self) -> dict[str, int | bool | None]:
        """Keyword arguments of the launch. Fused multiply-add is on: Triton's own default differs by version."""
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def emulated_architecture() -> int | None:
    """Compute capability (90 is 9.0) of the active Triton driver if it takes CPU tensors in place of a GPU's."""
    try:
        driver = triton.runtime.driver.active
        on_cpu = driver.get_active_torch_device().type == "cpu"
    except (RuntimeError, AssertionError):  # no driver, or no CUDA in this build of torch
        return None
    return int(driver.get_current_target().arch) if on_cpu else None


# Held while Triton may compile: replicas launch and warm up in threads of their own, and ``ast.parse``, which Triton
# calls, fails at times in threads that parse at once (CPython 3.11: "AST constructor recursion depth mismatch").
compiling = threading.RLock()


@contextlib.contextmanager
def launching(tensor: Tensor) -> Iterator[None]:
    """Around a launch, which compiles what it has not met before: one thread at a time, on the device of ``tensor``.

    Triton launches on torch's current device.
    """
    with compiling, torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


def checked(tensor: Tensor, name: str, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> Tensor:
    """``tensor``, contiguous, if it is what the kernels on ``device`` read.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {wanted} {shape} on {device}, not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor if tensor.is_contiguous() else tensor.contiguous()
