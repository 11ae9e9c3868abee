"""Kernels with one barrier, fence or wait less: which of them the emulator notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ptx.driver import EmulatedDriver
from ptx.program import Instruction, PtxError

SYNCHRONISING = ("bar.", "barrier.", "fence.", "membar.", "cp.async.wait", "cp.async.commit", "wgmma.fence",
                 "wgmma.commit", "wgmma.wait")  # fmt: skip


def mutations(driver: EmulatedDriver, launch: Callable[[], Tensor]) -> Iterator[tuple[str, int, Instruction, bool]]:
    """Every kernel of ``launch`` without each of its synchronising instructions in turn: name, position, instruction,
    and whether that was noticed: by a fault, an error, or another result."""
    programs = {}

    def keep(program):  # type: ignore[no-untyped-def]
        programs[program.name] = program
        return program

    driver.strict, driver.change = False, keep
    expected = launch()
    assert not driver.faults, driver.faults
    for name, program in programs.items():
        for index, instruction in enumerate(program.instructions):
            if not instruction.name.startswith(SYNCHRONISING):
                continue
            mutant = program.without(index)
            driver.change = lambda each, name=name, mutant=mutant: mutant if each.name == name else each
            driver.faults.clear()
            try:
                noticed = not torch.equal(launch(), expected) or bool(driver.faults)
            except PtxError:
                noticed = True
            yield name, index, instruction, noticed
    driver.change = lambda program: program
    driver.faults.clear()
