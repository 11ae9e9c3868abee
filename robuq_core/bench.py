"""Timings of the packed forward against the same network in torch FP32, in one run, interleaved, each checked.

A timing counts only if the result is right: the packed output must agree with the reference backend's on the same
input, or the benchmark fails.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from robuq_core.checkpoint import layer_shapes, read_checkpoint
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.errors import UserError
from robuq_core.kernels.ops import Backend, TernaryLayer
from robuq_core.kernels.select import select_backend
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.presets import preset
from robuq_core.models.quant_linear import is_adaln, layer_bits
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar

# A code on the edge of its cell may fall either way when two backends round sums in another order; with few bits
# such a flip is as large as a step. The outputs then differ a little, never by this much.
MAX_RELATIVE_ERROR = 0.05


class BenchError(UserError):
    """A benchmark whose numbers cannot be trusted."""


@dataclass(frozen=True)
class ForwardTiming:
    """Medians in seconds over interleaved runs; ``ratio`` is FP32 over packed (above 1: packed is faster)."""

    model: str
    batch: int
    backend: str
    packed_s: float
    packed_spread_s: float
    fp32_s: float
    fp32_spread_s: float
    ratio: float
    relative_error: float


def bench_forward(
    name: str, batches: list[int], *, checkpoint: Path | None, backend: str, threads: int | None, repeats: int
) -> list[ForwardTiming]:
    """Time one forward at each batch size. ``name`` is a preset with random weights unless ``checkpoint`` is given.

    Raises:
        BenchError: the packed output disagrees with the reference. ValueError: unknown preset or backend.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    ops, law = select_backend(backend, threads), select_backend("reference", threads)
    config, build = _model_source(name, checkpoint)
    packed, reference, plain = build(ops), build(law), DiT(config).eval()
    for parameter in plain.parameters():
        # Zero-initialised layers would let a clever matrix product cheat.
        torch.nn.init.normal_(parameter, std=0.02)
    return [_time_batch(name, batch, packed, reference, plain, repeats) for batch in batches]


def _model_source(name: str, checkpoint: Path | None) -> tuple[ModelConfig, Callable[[Backend], PackedDiT]]:
    if checkpoint is None:
        config, quant = preset(name), QuantConfig()
        dense, layers = random_weights(config, quant)
    else:
        loaded = read_checkpoint(checkpoint)
        config, quant, dense, layers = loaded.header.model, loaded.header.quant, loaded.dense, loaded.layers
    return config, lambda ops: PackedDiT(config, dense, layers, ops, quant.attention_bits is not None)


def random_weights(config: ModelConfig, quant: QuantConfig) -> tuple[dict[str, Tensor], dict[str, TernaryLayer]]:
    """Random dense tensors and packed layers of a shape, as a checkpoint would give them."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        skeleton = DiT(config)
    dense = {
        name: torch.randn(p.shape, generator=generator) * 0.02
        for name, p in skeleton.named_parameters()
        if not name.startswith("blocks.")
    }
    layers = {}
    for name, (out, into) in layer_shapes(config).items():
        rank = quant.adaln_rank if is_adaln(name) else quant.rank
        codes = torch.randint(-1, 2, (out, into), generator=generator, dtype=torch.int8)
        layers[name] = TernaryLayer(
            planar=pack_planar(codes),
            alpha=torch.full((out,), into**-0.5).half().float(),
            bias=torch.zeros(out),
            signs=random_signs(into, generator),
            lowrank_a=torch.randn(out, rank, generator=generator) * 0.02,
            lowrank_b=torch.randn(rank, into, generator=generator) * 0.02,
            bits=layer_bits(name, quant),
            grid=quant.grid,
        )
    return dense, layers


@torch.inference_mode()
def _time_batch(
    name: str, batch: int, packed: PackedDiT, reference: PackedDiT, plain: DiT, repeats: int
) -> ForwardTiming:
    config, generator = plain.config, torch.Generator().manual_seed(batch)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    inputs = (x, torch.randint(0, 1000, (batch,), generator=generator), torch.arange(batch) % config.num_classes)
    expected, result = reference.forward(*inputs), packed.forward(*inputs)
    error = float((result - expected).norm() / expected.norm())
    if not error <= MAX_RELATIVE_ERROR:
        raise BenchError(
            f"{name} at batch {batch}: {packed.backend.name} is off by {error:.3f} of the reference's norm; "
            f"at most {MAX_RELATIVE_ERROR} is rounding. No timing is reported"
        )
    plain(*inputs)
    packed_times, plain_times = [], []
    for _ in range(repeats):
        packed_times.append(_seconds(lambda: packed.forward(*inputs)))
        plain_times.append(_seconds(lambda: plain(*inputs)))
    fast, slow = median(packed_times), median(plain_times)
    return ForwardTiming(
        name, batch, packed.backend.name, fast, max(packed_times) - min(packed_times),
        slow, max(plain_times) - min(plain_times), slow / fast, error,
    )  # fmt: skip


def _seconds(call: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def as_json(timings: list[ForwardTiming]) -> dict[str, Any]:
    return {"machine": machine(), "forward": [asdict(timing) for timing in timings]}
