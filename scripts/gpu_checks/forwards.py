"""Whole forwards of a packed network, eager and as recorded graphs: results, then times."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_checks.check import Check
from robuq_core.bench.source import random_checkpoint
from robuq_core.bench.timing import relative_error
from robuq_core.config import QuantConfig
from robuq_core.kernels.ops import Backend
from robuq_core.models.graphs import CudaRecorder, GraphedDenoise
from robuq_core.models.packed_dit import PackedDiT

FORWARD_TOLERANCE = 0.05


def _network(check: Check, backend: Backend) -> PackedDiT:
    found = random_checkpoint(check.sizes.model, QuantConfig())
    return PackedDiT(check.sizes.model, found.dense, found.layers, backend)


def _graphed(check: Check, network: PackedDiT) -> GraphedDenoise[Tensor]:
    return GraphedDenoise(network.denoise, CudaRecorder(check.device) if check.on_gpu else _run_again)


def _rows(check: Check, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    config = check.sizes.model
    x = check.normal(rows, config.in_channels, config.input_size, config.input_size)
    return x, 37 * torch.arange(rows) % 1000, torch.arange(rows) % config.num_classes


def forward(check: Check) -> dict[str, Any]:
    """A packed network against the reference's; and recorded as graphs, to the bit, alone and among others: with
    activations in float32 and in bfloat16, and how far the second is from the first."""
    sides = {"float32": (check.ours, check.law), "bfloat16": (check.narrow, check.narrow_law)}
    result = {name: _agreement(check, *(_network(check, ops) for ops in both)) for name, both in sides.items()}
    x, timesteps, classes = _rows(check, 1)
    wide, narrow = (_network(check, ops).forward(x, timesteps, classes) for ops in (check.ours, check.narrow))
    return result | {"bfloat16_from_float32": relative_error(narrow, wide)}


def _agreement(check: Check, ours: PackedDiT, law: PackedDiT) -> dict[str, Any]:
    graphed = _graphed(check, ours)
    result: dict[str, Any] = {"relative_error": {}, "graphs_equal": {}, "alone_equal": {}}
    for rows in check.sizes.batches:
        x, timesteps, classes = _rows(check, rows)
        slots, table = ours.conditioning.slots(timesteps.tolist(), classes.tolist()), ours.conditioning.table
        eager = ours.denoise(x, slots, table)
        places = law.conditioning.slots(timesteps.tolist(), classes.tolist())
        expected = law.denoise(x, places, law.conditioning.table)
        result["relative_error"][rows] = relative_error(eager, expected)
        result["graphs_equal"][rows] = torch.equal(graphed(x, slots, table), eager)
        result["alone_equal"][rows] = torch.equal(ours.denoise(x[-1:], slots[-1:], table), eager[-1:])
    assert max(result["relative_error"].values()) <= FORWARD_TOLERANCE, result
    if check.on_gpu:
        assert all(result["graphs_equal"].values()), result
        assert all(result["alone_equal"].values()), result
    return result


def _run_again(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    out = run().clone()

    def replay() -> None:
        out.copy_(run())

    return replay, out


def time_forward(check: Check) -> dict[str, Any]:
    sides = {"float32": check.ours, "bfloat16": check.narrow}
    found = {name: _times(check, _network(check, ops)) for name, ops in sides.items()}
    return {"depth": check.sizes.model.depth, "rows": found}


def _times(check: Check, network: PackedDiT) -> dict[int, dict[str, float]]:
    graphed, found = _graphed(check, network), {}
    for rows in check.sizes.batches:
        x, timesteps, classes = _rows(check, rows)
        slots, table = network.conditioning.slots(timesteps.tolist(), classes.tolist()), network.conditioning.table
        found[rows] = {
            name: min(_wall_milliseconds(check, functools.partial(run, x, slots, table)) for _ in range(3))
            for name, run in (("eager_ms", network.denoise), ("graphed_ms", graphed))
        }
    return found


def _wall_milliseconds(check: Check, run: Callable[[], object]) -> float:
    """A forward as the host sees it."""
    calls = 10 if check.on_gpu else 1
    run()
    _wait(check)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(check)
    return 1e3 * (time.perf_counter() - began) / calls


def _wait(check: Check) -> None:
    if check.on_gpu:
        torch.cuda.synchronize(check.device)
