"""Every case of DiT-XL/2 compiled for GPUs that are not there: nothing spills, shared memory fits, stores are wide. The
launches of a block have budgets of their own (``test_triton_budgets.py``)."""

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


@pytest.fixture(scope="module", params=[80, 86, 89, 90, 100], ids="sm{}".format)
def compiled(request: pytest.FixtureRequest) -> list[tuple[Case, Compiled]]:
    return [(case, case.compile(request.param)) for case in cases(request.param)]


def test_nothing_spills_and_shared_memory_fits(compiled: list[tuple[Case, Compiled]]) -> None:
    for case, result in compiled:
        assert result.stack == 0, f"{case.name} on sm_{result.architecture} spills {result.stack} bytes a thread"
        assert result.shared <= SHARED_LIMIT[result.architecture], case.name


def test_bfloat16_is_rounded_by_one_instruction(compiled: list[tuple[Case, Compiled]]) -> None:
    """To the nearest even, one value or two at once."""
    for case, result in compiled:
        if case.name.startswith(("ternary_linear", "attention")):
            found = re.search(r"cvt\.rn\.bf16(x2)?\.f32", result.ptx)
            assert (found is not None) == ("bf16" in case.name), case.name


def test_products_are_stored_16_bytes_at_a_time(compiled: list[tuple[Case, Compiled]]) -> None:
    for case, result in compiled:
        if case.name.startswith("ternary_linear"):
            stores = re.findall(r"st\.global\S*", result.ptx)
            assert stores
            narrow = [store for store in stores if ".v4." not in store]
            assert len(narrow) == (case.config.blocks.get("SPLIT", 1) > 1), case.name  # the counter of arrivals


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
            next(iter(cases(80))).compile(80)
        assert other.submit(lambda: compiling.acquire(blocking=False) and compiling.release() is None).result()
