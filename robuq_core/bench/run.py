"""A plan and its execution: which cases, in which order, on which sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from robuq_core.bench.levels import OURS, Bench, block_case, forward_case, image_case, op_case
from robuq_core.bench.machine import machine
from robuq_core.bench.peers import PEERS
from robuq_core.bench.processes import MEMORY_SIDES, as_file, measure_loading, measure_memory
from robuq_core.bench.report import LEVELS, CaseTiming, Loading, MemoryUse, Report
from robuq_core.bench.source import Source, open_source
from robuq_core.bench.timing import device_timer
from robuq_core.kernels.backends import select_backend
from robuq_core.models.packed_dit import LAYERS

Result = CaseTiming | MemoryUse | Loading


@dataclass(frozen=True)
class Plan:
    """Cases of one source. ``layers``: of level op, by their names in a block."""

    levels: Sequence[str]
    batches: Sequence[int]
    preset: str | None = None
    checkpoint: Path | None = None
    layers: Sequence[str] = LAYERS
    peers: Sequence[str] = tuple(PEERS)


@dataclass(frozen=True)
class Settings:
    """``rounds`` at most per side and about ``budget_s`` seconds per case."""

    backend: str = "auto"
    threads: int | None = None
    device: str | None = None
    rounds: int = 11
    budget_s: float = 60.0
    loading_runs: int = 3


# DiT-XL/2 where its work is (the widest and the deepest layer, one block), the bundled checkpoint as a whole.
QUICK_PLANS: tuple[Plan, ...] = (
    Plan(("op",), (2,), preset="DiT-XL/2", layers=("attn.qkv", "mlp.fc2")),
    Plan(("block",), (2,), preset="DiT-XL/2"),
    Plan(("forward",), (8,), peers=("fp32", "fp32-compiled", "int8-onednn")),
    Plan(("image", "memory", "loading"), (1,)),
)
QUICK_SETTINGS = Settings(rounds=7, budget_s=10.0)


def run_plans(
    plans: Sequence[Plan], settings: Settings, on_result: Callable[[Result], None] = lambda _: None
) -> Report:
    """Run ``plans``; ``on_result`` hears of each result as it comes.

    Raises:
        BenchError: one of our results is wrong. ValueError, UserError: a plan names what does not exist.
    """
    for plan in plans:
        _known("level", plan.levels, LEVELS)
        _known("peer", plan.peers, PEERS)
        _known("layer", plan.layers, LAYERS)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    described = machine()
    backend = select_backend(settings.backend, settings.threads, settings.device)
    results: list[Result] = []
    for plan in plans:
        for result in _run(plan, settings):
            on_result(result)
            results.append(result)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=described,
        settings=asdict(settings) | {"kernels": backend.name},
        cases=tuple(r for r in results if isinstance(r, CaseTiming)),
        memory=tuple(r for r in results if isinstance(r, MemoryUse)),
        loading=tuple(r for r in results if isinstance(r, Loading)),
    )


def _known(kind: str, names: Iterable[str], choices: Iterable[str]) -> None:
    for name in set(names) - set(choices):
        raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(choices)}")


def _run(plan: Plan, settings: Settings) -> Iterator[Result]:
    backend = select_backend(settings.backend, settings.threads, settings.device)
    source = open_source(plan.preset, plan.checkpoint)
    timer = device_timer(backend.device, settings.rounds, settings.budget_s)
    bench = Bench(source, backend, timer, plan.peers)
    for batch in plan.batches:
        if "op" in plan.levels:
            for layer in plan.layers:
                yield op_case(bench, layer, batch)
        if "block" in plan.levels:
            yield block_case(bench, batch)
        if "forward" in plan.levels:
            yield forward_case(bench, batch)
        if "image" in plan.levels and source.draws_pixels:
            yield image_case(bench, batch)
    yield from _in_processes(plan, settings, source)


def _in_processes(plan: Plan, settings: Settings, source: Source) -> Iterator[Result]:
    if not {"memory", "loading"} & set(plan.levels):
        return
    where = {"backend": settings.backend, "threads": settings.threads, "device": settings.device}
    with as_file(source) as path:
        if "memory" in plan.levels:
            sides = (OURS, *(name for name in plan.peers if name in MEMORY_SIDES))
            for batch in plan.batches:
                yield from measure_memory(source.name, path, batch, where, sides)
        if "loading" in plan.levels:
            yield measure_loading(source.name, path, where, settings.loading_runs)
