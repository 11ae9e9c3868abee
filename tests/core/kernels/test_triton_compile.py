"""Kernels compiled ahead of time for GPUs that are not there: nothing spills, shared memory fits, tensor cores work."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from robuq_core.kernels.triton import aot
from robuq_core.kernels.triton.aot import SHARED_LIMIT, Compiled
from robuq_core.kernels.triton.cases import Case, cases
from robuq_core.kernels.triton.config import compiling, launching
from robuq_core.kernels.triton.ternary_linear import _DECODE
from robuq_core.quant.packing import pack_planar

TENSOR_INSTRUCTIONS = {80: {"mma.sync"}, 86: {"mma.sync"}, 89: {"mma.sync"}, 90: {"wgmma"}}


def _each_kernel_once(architecture: int) -> list[Case]:
    return list({case.kernel: case for case in reversed(list(cases(architecture)))}.values())


@pytest.fixture(
    scope="module",
    params=[
        (90, _each_kernel_once),
        # Launch shapes of 8.6 and 8.9 differ from 8.0 in the pipeline alone.
        *(pytest.param((sm, cases), marks=pytest.mark.slow) for sm in (80, 90)),
        *(pytest.param((sm, _each_kernel_once), marks=pytest.mark.slow) for sm in (86, 89, 100)),
    ],
    ids=lambda each: f"{each[0]}-{each[1].__name__.strip('_')}",
)
def compiled(request: pytest.FixtureRequest) -> list[tuple[Case, Compiled]]:
    architecture, chosen = request.param
    return [(case, case.compile(architecture)) for case in chosen(architecture)]


def test_nothing_spills_and_shared_memory_fits(compiled: list[tuple[Case, Compiled]]) -> None:
    for case, result in compiled:
        assert result.stack == 0, f"{case.name} on sm_{result.architecture} spills {result.stack} bytes a thread"
        assert result.shared <= SHARED_LIMIT[result.architecture], case.name


def test_products_run_on_the_tensor_cores(compiled: list[tuple[Case, Compiled]]) -> None:
    for case, result in compiled:
        if case.name.startswith("ternary_linear"):
            kinds = result.tensor_instructions()
            # Triton 3.6 multiplies int8 on sm_100 with mma.sync, later versions with tcgen05.
            expected = TENSOR_INSTRUCTIONS.get(result.architecture)
            assert kinds == expected if expected else kinds, case.name


def test_bfloat16_is_rounded_by_one_instruction(compiled: list[tuple[Case, Compiled]]) -> None:
    """To the nearest even, two values at once: only the interpreter needs more."""
    for case, result in compiled:
        if case.name.startswith(("ternary_linear", "attention")):
            assert ("cvt.rn.bf16x2.f32" in result.ptx) == ("bf16" in case.name), case.name


def test_products_are_stored_16_bytes_at_a_time(compiled: list[tuple[Case, Compiled]]) -> None:
    for case, result in compiled:
        if case.name.startswith("ternary_linear"):
            stores = re.findall(r"st\.global\S*", result.ptx)
            assert stores
            assert all(".v4." in store for store in stores), case.name


def test_one_thread_compiles_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython's parser is not safe in threads that parse at once."""
    with ThreadPoolExecutor(1) as other:

        def refused(*_: object, **__: object) -> None:
            assert not other.submit(compiling.acquire, blocking=False).result()
            raise InterruptedError

        with launching(torch.zeros(1)), pytest.raises(InterruptedError):
            refused()
        monkeypatch.setattr(aot.triton, "compile", refused)
        with pytest.raises(InterruptedError):
            _each_kernel_once(80)[0].compile(80)
        assert other.submit(lambda: compiling.acquire(blocking=False) and compiling.release() is None).result()


def _run_assembly(text: str, word: int) -> list[int]:
    """The four results of the decoder's PTX on one 32-bit register."""
    operations = {
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "sub.u32": lambda a, b: (a - b) % 2**32,
        "xor.b32": lambda a, b: a ^ b,
    }
    registers = {"$4": word}
    for line in text.strip("{}\n").split("\n"):
        name, *operands = line.rstrip(";").replace(",", " ").split()
        if name == ".reg":
            continue
        target, *sources = operands
        a, b = (registers[s] if s in registers else int(s, 0) for s in sources)
        registers[target] = operations[name](a, b)
    return [registers[f"${i}"] for i in range(4)]


def test_the_decoders_assembly_gives_the_packed_codes() -> None:
    """The interpreter cannot run it: every byte of valid codes goes through it here, four neighbours at a time."""
    digits = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 4)  # a row a byte: the codes of its four planes
    digits = torch.cat([digits, digits[:15]])  # 96 bytes
    planes = digits.T.reshape(4, 3, 32).permute(1, 0, 2).reshape(1, -1).to(torch.int8)
    packed = pack_planar(planes).flatten().tolist()
    text = getattr(_DECODE, "value", _DECODE)
    for first in range(0, len(packed), 4):
        word = int.from_bytes(bytes(packed[first : first + 4]), "little")
        results = [list(value.to_bytes(4, "little")) for value in _run_assembly(text, word)]
        decoded = torch.tensor(results, dtype=torch.uint8).view(torch.int8)
        assert torch.equal(decoded.T.long(), digits[first : first + 4])
