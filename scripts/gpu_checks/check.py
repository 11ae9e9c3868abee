"""What every part of the GPU check needs: the backends, the sizes, random layers and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robuq_core.config import ModelConfig
from robuq_core.kernels.ops import NarrowBackend, TernaryLayer
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar

BFLOAT16 = torch.bfloat16
XL_SHAPES = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}


@dataclass(frozen=True)
class Sizes:
    """``widths`` of layers, ``rows`` of inputs, ``heads`` as (pictures, tokens, heads, head_dim)."""

    widths: tuple[int, ...]
    rows: tuple[int, ...]
    heads: tuple[tuple[int, int, int, int], ...]
    model: ModelConfig
    batches: tuple[int, ...]
    timed_rows: int
    shapes: dict[str, tuple[int, int]]


FULL = Sizes(
    widths=(36, 96, 288, 384, 768, 1152, 3072, 4608),
    rows=(1, 17, 130, 2048),
    heads=((1, 1, 1, 8), (3, 67, 2, 72), (2, 256, 16, 72), (2, 1024, 4, 64), (1, 130, 2, 160)),
    model=ModelConfig(depth=4),
    batches=(1, 2, 3, 8),
    timed_rows=2048,
    shapes=XL_SHAPES,
)
TINY = Sizes(
    widths=(36, 96),
    rows=(1, 9),
    heads=((2, 9, 2, 12),),
    model=ModelConfig(input_size=4, hidden_size=48, depth=1, num_heads=4, num_classes=10),
    batches=(1, 3),
    timed_rows=16,
    shapes={"qkv": (36, 40), "proj": (36, 40)},
)


class Check:
    """The backends, the sizes, and what every part needs of them. ``narrow``: ``ours`` with activations in bfloat16."""

    def __init__(self, rehearse: bool) -> None:
        self.sizes = TINY if rehearse else FULL
        from robuq_core.kernels.triton.backend import TritonBackend  # not before the interpreter is chosen

        self.ours: NarrowBackend = TritonBackend()
        self.narrow: NarrowBackend = TritonBackend(activations=BFLOAT16)
        self.device = self.ours.device
        self.law, self.narrow_law = ReferenceBackend(self.device), NarrowReferenceBackend(self.device)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal."""
        return self.device.type == "cuda"

    @property
    def architecture(self) -> int:
        """Compute capability, 90 for 9.0; the interpreter passes for that."""
        major, minor = torch.cuda.get_device_capability(self.device) if self.on_gpu else (9, 0)
        return 10 * major + minor

    def layer(self, width: int, outputs: int, *, bits: int = 2, rank: int = 16, grid: Any = "midrise") -> TernaryLayer:
        weight = torch.randint(-1, 2, (outputs, width), generator=self.generator, dtype=torch.int8)
        a, b = self.normal(outputs, rank) * 0.02, self.normal(rank, width) * 0.02
        alpha, bias = self.normal(outputs).abs() * width**-0.5, self.normal(outputs)
        signs = random_signs(width, self.generator)
        return TernaryLayer(pack_planar(weight), alpha, bias, signs, a, b, bits, grid).to(self.device)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of one call inside a CUDA graph of many: no launch from the host in it, weights warm in L2."""
        if self.on_gpu:
            from triton.testing import do_bench_cudagraph

            return float(do_bench_cudagraph(run, rep=20, return_mode="median"))
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
