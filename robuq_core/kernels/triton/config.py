"""How a kernel is launched: its tile sizes, its warps, its pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class LaunchConfig:
    """``blocks``: the kernel's tile sizes by name. ``num_stages``: buffers of its software pipeline."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch. Fused multiply-add is on: Triton's own default differs by version."""
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` before the first import)."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Triton launches on torch's current device: make it the one that ``tensor`` lies on."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def checked(tensor: Tensor, name: str, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> Tensor:
    """``tensor``, contiguous, if it is what the kernels read.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device.type != device.type:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {wanted} {shape} on {device}, not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor if tensor.is_contiguous() else tensor.contiguous()
