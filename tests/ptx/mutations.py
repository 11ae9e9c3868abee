"""Kernels with one barrier, fence or wait less: which of them the emulator notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ptx.driver import EmulatedDriver
from ptx.program import Program, PtxError

SYNCHRONISING = ("bar.", "barrier.", "fence.", "membar.", "cp.async.wait", "cp.async.commit", "wgmma.fence",
                 "wgmma.commit", "wgmma.wait")  # fmt: skip
MEMORY = ("ld", "st", "cp", "atom", "red", "ldmatrix", "stmatrix", "bra")


def candidates(program: Program) -> Iterator[list[int]]:
    """Synchronising instructions, each with those of its kind that follow before anything is accessed: any one of them
    does what all do. Of products on the same sums, which follow each other without a fence or a wait, all together."""
    runs: dict[str, list[int]] = {}
    for index, instruction in enumerate(program.instructions):
        accesses = instruction.parts[0] in MEMORY or index in program.labels.values()
        if instruction.name.startswith(SYNCHRONISING):
            runs.setdefault(instruction.name, []).append(index)
        elif accesses or instruction.parts[0] == "wgmma":
            for name in [each for each in runs if accesses or not each.startswith("wgmma")]:
                yield runs.pop(name)
    yield from runs.values()


def mutations(driver: EmulatedDriver, launch: Callable[[], Tensor]) -> Iterator[tuple[str, list[int], bool]]:
    """Every kernel of ``launch`` without each of its candidates in turn: opcode, positions, and whether that was
    noticed: by a fault, an error, or another result."""
    programs = {}

    def keep(program):  # type: ignore[no-untyped-def]
        programs[program.name] = program
        return program

    driver.strict, driver.change = False, keep
    expected = launch()
    assert not driver.faults, driver.faults
    for name, program in programs.items():
        for indices in candidates(program):
            mutant = program.without(indices)
            driver.change = lambda each, name=name, mutant=mutant: mutant if each.name == name else each
            driver.faults.clear()
            try:
                noticed = not torch.equal(launch(), expected) or bool(driver.faults)
            except PtxError:
                noticed = True
            yield program.instructions[indices[0]].name, indices, noticed
    driver.change = lambda program: program
    driver.faults.clear()
