"""What the kernels share: how they are launched, and operations on single values."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pydantic import PositiveInt
from torch import Tensor

# Shared memory a block may use, bytes, by compute capability (CUDA C programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Least sizes of a tile on the tensor cores: its rows, and the inner dimension of an int8 product.
MIN_ROWS, MIN_DEPTH = 16, 32


@dataclass(frozen=True)
class LaunchConfig:
    """``blocks``: the kernel's tile sizes by name. ``num_stages``: buffers of its software pipeline. ``max_registers``
    per thread: None for no limit."""

    blocks: dict[str, PositiveInt]
    num_warps: PositiveInt
    num_stages: PositiveInt
    max_registers: PositiveInt | None = None

    def options(self) -> dict[str, int | bool | None]:
        """Keyword arguments of the launch. Fused multiply-add is on: Triton's own default differs by version."""
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}
        return {**self.blocks, **launch, "enable_fp_fusion": True}


@triton.constexpr_function
def power_of_2(n: int, least: int = 1) -> int:
    """The least power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(n - 1, 0).bit_length())


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
    return tensor.contiguous()


# Inline assembly: from four bytes the digits of their four planes, four at a time.
UNPACK = tl.constexpr(
    "{\n.reg .b32 t;\nand.b32 $0, $4, 0x03030303;\n"
    + "".join(f"shr.u32 t, $4, {2 * i};\nand.b32 ${i}, t, 0x03030303;\n" for i in (1, 2, 3))
    + "}"
)


# Triton 3.6 leaves out the fence between copies to shared memory and the tensor cores of 9.0, which read them.
FENCED = tl.constexpr(triton.__version__.startswith("3.6."))


@triton.jit
def fence_copies():  # type: ignore[no-untyped-def]
    """In front of a product of tiles that a loop copies ahead of their use."""
    if FENCED and tl.target_info.is_cuda() and tl.target_info.cuda_capability_geq(9):
        asm: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """The tanh form."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rounded(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def tf32_parts(x):  # type: ignore[no-untyped-def]
    """``x`` as a sum of two values of tf32's 11 significant bits (the product itself cuts off the second)."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high
