"""What every job needs: the device, the backends, the sizes, random layers, a clock, and where results go."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from robuq_core.config import ModelConfig
from robuq_core.kernels.ops import Backend, Modulation, NarrowBackend, Prologue, TernaryLayer
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar

BFLOAT16 = torch.bfloat16
# Larger than the L2 cache of an H100: inputs that a network would have to fetch are not found there.
ROTATED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Sizes:
    """``widths`` and ``rows`` of checks; ``heads`` as (images, tokens, heads, head_dim); ``shapes`` (K, N) of the
    layers and ``timed_rows`` of times; ``model`` and ``batches`` of forwards."""

    widths: tuple[int, ...]
    rows: tuple[int, ...]
    heads: tuple[tuple[int, int, int, int], ...]
    shapes: dict[str, tuple[int, int]]
    timed_rows: tuple[int, ...]
    model: ModelConfig
    batches: tuple[int, ...]
    repeats: int


FULL = Sizes(
    widths=(36, 96, 288, 384, 768, 1152, 3072, 4608),
    rows=(1, 17, 130, 2048),
    heads=((2, 256, 16, 72), (1, 1, 1, 8), (3, 67, 2, 72), (2, 1024, 4, 64), (1, 130, 2, 160)),
    shapes={"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)},
    timed_rows=(2048, 256, 512, 8192),
    model=ModelConfig(),
    batches=(8, 1, 32, 2),
    repeats=300,
)
TINY = Sizes(
    widths=(36,),
    rows=(1, 9),
    heads=((2, 9, 2, 12),),
    shapes={"qkv": (36, 40), "fc2": (36, 40)},
    timed_rows=(9,),
    model=ModelConfig(input_size=8, hidden_size=48, depth=1, num_heads=4, num_classes=10),
    batches=(2, 1),
    repeats=2,
)


class Context:
    """One job. In a rehearsal the device is the CPU, and kernels run in the emulator of the tests."""

    def __init__(self, job: str, out: Path, rehearse: bool, part: int = 0, parts: int = 1) -> None:
        self.job, self.out, self.rehearse = job, out, rehearse
        self.part, self.parts = part, parts
        self.sizes = TINY if rehearse else FULL
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.generator = torch.Generator().manual_seed(0)
        self._closing = contextlib.ExitStack()
        torch.backends.cuda.matmul.allow_tf32 = False

    def __enter__(self) -> Context:
        if self.rehearse:
            from ptx.driver import emulated

            self._closing.enter_context(emulated(90))
        self._closing.enter_context(torch.inference_mode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.record(event="error", error=f"{type(error).__name__}: {error}"[:1500])
        self._closing.close()

    def record(self, **found: Any) -> None:
        """Append a line to the results; floats are rounded to five digits."""

        def rounded(value: Any) -> Any:
            if isinstance(value, float):
                return float(f"{value:.5g}")
            if isinstance(value, dict):
                return {str(key): rounded(each) for key, each in value.items()}
            return [rounded(each) for each in value] if isinstance(value, list | tuple) else value

        line = json.dumps({"job": self.job, **rounded(found)}, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def check(self, holds: bool, **found: Any) -> None:
        """Record ``found``, which was measured, and fail unless it holds."""
        self.record(ok=holds, **found)
        if not holds:
            raise AssertionError(f"{self.job}: {found}")

    @cached_property
    def ours(self) -> NarrowBackend:
        from robuq_core.kernels.triton.backend import TritonBackend

        return TritonBackend(activations=torch.float32)

    @cached_property
    def narrow(self) -> NarrowBackend:
        from robuq_core.kernels.triton.backend import TritonBackend

        return TritonBackend(activations=BFLOAT16)

    @cached_property
    def network_backends(self) -> dict[str, Backend]:
        """By the dtype of activations; the reference in a rehearsal, where emulated networks would take minutes."""
        if self.rehearse:
            return {"float32": self.reference, "bfloat16": self.narrow_reference}
        return {"bfloat16": self.narrow, "float32": self.ours}

    @cached_property
    def reference(self) -> ReferenceBackend:
        return ReferenceBackend(self.device)

    @cached_property
    def narrow_reference(self) -> NarrowReferenceBackend:
        return NarrowReferenceBackend(self.device)

    # Inputs

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def tokens(self, rows: int, width: int) -> Tensor:
        """Of uneven size, one channel an outlier."""
        outlier = 1 + 9 * (torch.arange(width, device=self.device) == width // 2)
        return self.normal(rows, width) * self.normal(rows, 1).abs().add(0.1) * outlier

    def layer(self, width: int, outputs: int, *, bits: int = 3, rank: int = 16, grid: Any = "midrise") -> TernaryLayer:
        weight = torch.randint(-1, 2, (outputs, width), generator=self.generator, dtype=torch.int8)
        a, b = self.normal(outputs, rank) * 0.02, self.normal(rank, width) * 0.02
        alpha, bias = self.normal(outputs).abs() * width**-0.5, self.normal(outputs)
        signs = random_signs(width, self.generator)
        return TernaryLayer(pack_planar(weight), alpha, bias, signs, a, b, bits, grid).to(self.device)

    def modulation(self, images: int, width: int) -> Modulation:
        return Modulation(self.normal(images, width), self.normal(images, width), 1e-6)

    def prologues(self, rows: int, width: int) -> list[Prologue]:
        """One of each kind."""
        images = next(n for n in (4, 3, 2, 1) if rows % n == 0)
        return [None, "gelu", "silu", self.modulation(images, width)]

    # Time

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
        """Of one of ``calls``, which do the same on different inputs: median of replays of a CUDA graph of all of them,
        so that no time of the host is in it."""
        for call in calls:
            call()
        if self.device.type != "cuda":
            began = time.perf_counter()
            calls[0]()
            return 1e3 * (time.perf_counter() - began)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            for call in calls:
                call()
        graph.replay()
        return self.event_milliseconds(graph.replay, repeats) / len(calls)

    def event_milliseconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median over ``repeats`` of what the device takes, the host's gaps included."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in pairs:
            begin.record()
            run()
            end.record()
        self.wait()
        return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]

    def copies(self, tensor: Tensor, least: int = 2, most: int = 64) -> list[Tensor]:
        """So many copies that together they do not fit the L2 cache."""
        count = 1 if self.rehearse else min(most, max(least, -(-ROTATED_BYTES // max(1, tensor.nbytes))))
        return [tensor.clone() for _ in range(count)]
