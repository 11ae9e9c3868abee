"""A whole study: every run of the configuration on all cores, what is done already left alone, then the report."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from robuq_core.config import QuantConfig
from robuq_core.cpus import available_cpus
from train.ablations.config import AllocationSpec, Row, RunSpec, StudyConfig, TeacherSpec
from train.ablations.dataset import check_fits
from train.ablations.runs import (
    RowAllocation,
    RunResult,
    Workplace,
    find_widths,
    network_digest,
    read_allocation,
    read_result,
    run,
    with_widths,
)
from train.state import exclusive

_ORPHAN_CHECK_S = 1.0

_Found = TypeVar("_Found")


class Study:
    """The runs that ``config`` asks for, by row, width and seed, and where their results lie (``place``)."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config = config
        self.place = Workplace(folder, config.data, config.classifier)
        data = self.place.images()
        check_fits(data, config.model.input_size, config.model.num_classes)
        self.teacher = TeacherSpec(
            data=data.checksum,
            model=config.model,
            diffusion=config.diffusion,
            class_dropout=config.class_dropout,
            stage=config.teacher,
        )

    def run_spec(self, quant: QuantConfig | None, seed: int) -> RunSpec:
        config = self.config
        return RunSpec(
            teacher=self.teacher,
            classifier=config.classifier,
            sampler=config.sampler,
            samples=config.samples,
            stage=config.qat if quant is not None else config.qat.model_copy(update={"distill_weight": 0.0}),
            quant=quant,
            seed=seed,
        )

    def full_precision(self, seed: int) -> RunSpec:
        """The teacher trained on for as many steps as a student, not quantised."""
        return self.run_spec(None, seed)

    def allocation_spec(self, row: Row, width: int) -> AllocationSpec:
        return AllocationSpec(
            teacher=self.teacher,
            quant=_at_width(row, width),
            warmup=self.config.warmup if row.sensitivity_after == "warmup" else None,
            sensitivity=self.config.sensitivity,
        )

    def row_spec(self, row: Row, width: int, seed: int) -> RunSpec | None:
        """None as long as the row's widths are not found."""
        quant = _at_width(row, width)
        if row.allocate is not None:
            found = read_allocation(self.place, self.allocation_spec(row, width))
            if found is None:
                return None
            quant = with_widths(quant, found.allocations[row.allocate].bits)
        return self.run_spec(quant, seed)

    def row_specs(self, rows: Iterable[Row]) -> Iterator[RunSpec]:
        """Those whose widths are known, seed by seed: a study that is cut short has whole ladders of fewer seeds."""
        for seed in self.config.seeds:
            for row in rows:
                for width in self.config.row_widths(row):
                    spec = self.row_spec(row, width, seed)
                    if spec is not None:
                        yield spec

    def results(self, row: Row | None, width: int) -> list[RunResult]:
        """Results of the seeds, in order, of ``row`` or (none) of full precision; empty if one is missing."""
        specs = [self.full_precision(s) if row is None else self.row_spec(row, width, s) for s in self.config.seeds]
        found = [None if spec is None else read_result(self.place, spec) for spec in specs]
        return [] if None in found else [each for each in found if each is not None]

    def allocation(self, row: Row, width: int) -> RowAllocation | None:
        return None if row.allocate is None else read_allocation(self.place, self.allocation_spec(row, width))


def _at_width(row: Row, width: int) -> QuantConfig:
    return row.quant.model_copy(update={"activation_bits": width})


def run_study(config: StudyConfig, folder: Path, workers: int | None = None) -> Study:
    """Do what is missing of the study; its files lie below ``folder``.

    Feature network and teacher are trained first, on all cores; then as many runs at once as there are ``workers``
    (default: one a core), each on its share of the cores.

    Raises:
        UserError: data that do not fit, a folder in use or not writable.
    """
    console, cores = Console(), available_cpus()
    with exclusive(folder / "study.json"):
        study = Study(config, folder)
        # One image set, not one a process, of what all runs read.
        started = time.perf_counter()
        _, _, accuracy = study.place.network(network_digest(study.full_precision(0)))
        console.print(f"feature network: {accuracy:.1%} of the test images right ({_since(started)})")
        study.place.teacher(study.teacher)
        console.print(f"teacher {study.teacher.digest} ready ({_since(started)})")
        with _pool(workers or cores, cores) as pool:
            _run_all(study, pool, console)
    return study


def _run_all(study: Study, pool: Executor, console: Console) -> None:
    config = study.config
    searched = [row for row in config.rows if row.allocate is not None]
    fixed = [row for row in config.rows if row.allocate is None]
    widths = {
        spec.digest: spec
        for row in searched
        for width in config.row_widths(row)
        if read_allocation(study.place, spec := study.allocation_spec(row, width)) is None
    }
    searches = {pool.submit(find_widths, study.place, spec): f"widths {spec.digest}" for spec in widths.values()}
    plain = [*map(study.full_precision, config.seeds), *study.row_specs(fixed)]
    taken: set[str] = set()
    runs = _submit(study, pool, plain, taken)
    _follow(searches, console, lambda found: f"base {found.sensitivity.base}")
    runs |= _submit(study, pool, study.row_specs(searched), taken)
    _follow(runs, console, lambda result: f"distance {result.distance} in {result.seconds:.0f} s")


def _submit(study: Study, pool: Executor, specs: Iterable[RunSpec], taken: set[str]) -> dict[Future[RunResult], str]:
    """Start what has no result and is not ``taken``: searched widths may come out as those of a row without search."""
    missing = {s.digest: s for s in specs if s.digest not in taken and read_result(study.place, s) is None}
    taken |= missing.keys()
    return {pool.submit(run, study.place, spec): _title(spec) for spec in missing.values()}


def _title(spec: RunSpec) -> str:
    quant = spec.quant
    kind = "full precision" if quant is None else (
        f"A{quant.activation_bits}{' AMPN' if quant.bits else ''} {quant.activation} rotation {quant.rotation} "
        f"rank {quant.rank}"
    )  # fmt: skip
    return f"{kind}, seed {spec.seed}"


def _follow(pending: dict[Future[_Found], str], console: Console, said: Callable[[_Found], str]) -> None:
    for i, future in enumerate(as_completed(pending), 1):
        console.print(f"[{i}/{len(pending)}] {pending[future]}: {said(future.result())}", highlight=False)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


class _InTurn(Executor):
    """Runs each task when it is handed in, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _pool(workers: int, cores: int) -> Iterator[Executor]:
    if workers == 1:
        yield _InTurn()
        return
    # Spawned, not forked: a fork of a process whose torch has threads may hang.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(max(1, cores // workers), os.getpid())
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose study was killed would go on for nobody."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_CHECK_S)
    os._exit(1)
