"""What every job needs: the device, the backends, the sizes, random layers, a clock, and where results go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from robuq_core.bench.source import random_checkpoint
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.kernels.ops import Backend, Modulation, TernaryLayer
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar

T = TypeVar("T")
BFLOAT16 = torch.bfloat16
# Larger than the L2 cache of an H100: inputs that a network would have to fetch are not found there.
ROTATED_BYTES = 64 * 2**20


DIT_XL_2 = ModelConfig()


@dataclass(frozen=True)
class Sizes:
    """``widths`` and ``rows`` of checks; ``heads`` as (images, tokens, heads, head_dim); ``shapes`` (K, N) of the
    layers and ``timed_rows`` of times; ``model`` and ``batches`` of forwards. By default those of DiT-XL/2."""

    widths: tuple[int, ...] = (36, 96, 288, 384, 768, 1152, 3072, 4608)
    rows: tuple[int, ...] = (1, 17, 130, 2048)
    heads: tuple[tuple[int, int, int, int], ...] = (
        *((2, 256, 16, 72), (1, 1, 1, 8), (3, 67, 2, 72), (2, 1024, 4, 64), (1, 130, 2, 160)),
    )
    shapes: tuple[tuple[str, int, int], ...] = (
        *(("qkv", 1152, 3456), ("proj", 1152, 1152), ("fc1", 1152, 4608), ("fc2", 4608, 1152)),
    )
    timed_rows: tuple[int, ...] = (2048, 256, 512, 8192)
    model: ModelConfig = DIT_XL_2
    batches: tuple[int, ...] = (8, 1, 32, 2)
    repeats: int = 300


SMALL_MODEL = ModelConfig(input_size=8, hidden_size=48, depth=1, num_heads=4, num_classes=10)
TINY = Sizes((36,), (1, 9), ((2, 9, 2, 12),), (("qkv", 36, 40), ("fc2", 36, 40)), (9,), SMALL_MODEL, (2, 1), 2)


class Context:
    """One job, or share ``part`` of ``parts`` of it. In a rehearsal the device is the CPU and sizes are tiny."""

    def __init__(self, job: str, out: Path, rehearse: bool, part: int, parts: int) -> None:
        self.job, self.out, self.rehearse = job, out, rehearse
        self.part, self.parts = part, parts
        self.sizes = TINY if rehearse else Sizes()
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.generator = torch.Generator().manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = False
        self.wide, self.narrow = (TritonBackend(activations=dtype) for dtype in (torch.float32, BFLOAT16))
        self.reference, self.narrow_reference = ReferenceBackend(self.device), NarrowReferenceBackend(self.device)
        # By the dtype of activations; the reference in a rehearsal, where emulated networks would take minutes.
        self.network_backends: dict[str, Backend] = {
            "bfloat16": self.narrow_reference if rehearse else self.narrow,
            "float32": self.reference if rehearse else self.wide,
        }

    def record(self, **found: Any) -> None:
        """Append a line to the results."""
        line = json.dumps({"job": self.job, **found}, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def check(self, holds: bool, **found: Any) -> None:
        """Record ``found``, which was measured, and fail unless it holds."""
        self.record(ok=holds, **found)
        if not holds:
            raise AssertionError(f"{self.job}: {found}")

    def share(self, cases: Sequence[T]) -> Sequence[T]:
        """Those of this process."""
        return cases[self.part :: self.parts]

    # Inputs

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def tokens(self, rows: int, width: int) -> Tensor:
        """Of uneven size, one channel an outlier."""
        outlier = 1 + 9 * (torch.arange(width, device=self.device) == width // 2)
        return self.normal(rows, width) * self.normal(rows, 1).abs().add(0.1) * outlier

    def layer(self, width: int, outputs: int, *, bits: int = 3, rank: int = 16, grid: Any = "midrise") -> TernaryLayer:
        weight = torch.randint(-1, 2, (outputs, width), generator=self.generator, dtype=torch.int8)
        a, b = ((self.normal(*shape) * 0.02).bfloat16() for shape in ((outputs, rank), (rank, width)))
        alpha, bias = self.normal(outputs).abs() * width**-0.5, self.normal(outputs)
        signs = random_signs(width, self.generator)
        return TernaryLayer(pack_planar(weight), alpha, bias, signs, a, b, bits, grid).to(self.device)

    def modulation(self, images: int, width: int) -> Modulation:
        return Modulation(self.normal(images, width), self.normal(images, width), 1e-6)

    def network(self, backend: Backend, depth: int | None = None) -> PackedDiT:
        """A packed DiT of random weights, of the model's depth by default."""
        config = self.sizes.model.model_copy(update={"depth": depth or self.sizes.model.depth})
        found = random_checkpoint(config, QuantConfig())
        return PackedDiT(config, found.dense, found.layers, backend)

    def inputs(self, count: int) -> tuple[Tensor, list[int], list[int]]:
        """Of a forward of ``count`` rows: latents, timesteps, classes."""
        config = self.sizes.model
        x = self.normal(count, config.in_channels, config.input_size, config.input_size)
        return x, [37 * i % 1000 for i in range(count)], [i % config.num_classes for i in range(count)]

    def copies(self, tensor: Tensor) -> list[Tensor]:
        """As many copies as exceed the L2 cache together."""
        count = 1 if self.rehearse else min(64, max(2, -(-ROTATED_BYTES // max(1, tensor.nbytes))))
        return [tensor.clone() for _ in range(count)]

    # Time

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def wall_ms(self, run: Callable[[], object], calls: int = 10) -> float:
        """Of one call as the host sees it, after one that is not timed."""
        run()
        self.wait()
        calls, began = 1 if self.rehearse else calls, time.perf_counter()
        for _ in range(calls):
            run()
            self.wait()
        return 1e3 * (time.perf_counter() - began) / calls

    def graphed_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one of ``calls``, which do the same on different inputs: from a CUDA graph of all of them, without the
        host."""
        if self.rehearse:
            return self.wall_ms(calls[0])
        return do_bench_cudagraph(lambda: [call() for call in calls], rep=5, return_mode="median") / len(calls)

    def event_ms(self, run: Callable[[], object]) -> float:
        """Median of what the device takes, the host's gaps included, and nothing in the L2 cache."""
        return self.wall_ms(run) if self.rehearse else do_bench(run, return_mode="median")

    def peak_bytes(self) -> int | None:
        """Of the GPU's memory, since the last call."""
        if self.rehearse:
            return None
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
