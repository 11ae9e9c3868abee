"""The emulator notices barriers, fences and waits that are missing: each one of the project's kernels, in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from core.kernels.layer_cases import make_linear, prologues, tokens

from ptx.driver import EmulatedDriver, emulated
from ptx.program import Program, PtxError
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.kernels.triton.ternary_linear import async_config

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


# Of a kernel's synchronising instructions; docs/triton.md says why not all.
NOTICED = {"rotation": 1.0, "product": 0.85, "asynchronous product": 0.75, "attention": 0.8}


def launches(ops: TritonBackend) -> dict[str, Callable[[], Tensor]]:
    narrow, wide = pack_layer(make_linear(288, 70, bits=2, rank=3)), pack_layer(make_linear(768, 40, bits=2, rank=3))
    x, modulation = tokens(3, 288), prologues(1, 288)[3]
    quantized = ops.rotate_quantize(tokens(17, 768), wide)
    whole_groups = pack_layer(make_linear(896, 40, bits=2, rank=3))  # more groups than the ring has places
    codes = ops.rotate_quantize(tokens(17, 896), whole_groups)
    config = async_config(4096, 128, 896, 3, 90)
    qkv = tokens(67, 3 * 72).reshape(1, 67, -1)

    def rotation() -> Tensor:
        found = ops.rotate_quantize(x, narrow, modulation)
        return torch.cat([found.codes.flatten().float(), found.scales, found.lowrank.flatten()])

    return {
        "rotation": rotation,
        "product": lambda: ops.ternary_linear(quantized, wide),
        "asynchronous product": lambda: ops.ternary_linear(codes, whole_groups, config=config),
        "attention": lambda: ops.attention(qkv, 1, True),
    }


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(architecture, name) for name in NOTICED for architecture in ((90,) if "async" in name else (80, 90))],
)
def test_missing_barriers_and_fences_are_noticed(architecture: int, name: str) -> None:
    found: Counter[tuple[str, bool]] = Counter()
    with emulated(architecture) as driver:
        for opcode, _, noticed in mutations(driver, launches(TritonBackend())[name]):
            found[opcode, noticed] += 1
    seen = sum(count for (_, noticed), count in found.items() if noticed)
    print(architecture, name, f"{seen} of {found.total()}", dict(found))
    assert found
    assert seen >= NOTICED[name] * found.total(), found
