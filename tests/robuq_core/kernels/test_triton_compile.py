"""Kernels compiled ahead of time for GPUs that are not there: nothing spills, shared memory fits, tensor cores work."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from robuq_core.kernels.triton.aot import SHARED_LIMIT, Compiled
from robuq_core.kernels.triton.cases import Case, cases

# Launch shapes of 8.6 and 8.9 differ from 8.0 in the pipeline alone; the full list everywhere would take minutes.
EVERY_CASE = (80, 90)
TENSOR_INSTRUCTIONS = {80: {"mma.sync"}, 86: {"mma.sync"}, 89: {"mma.sync"}, 90: {"wgmma"}}


@pytest.fixture(scope="module", params=[80, 86, 89, 90, 100])
def compiled(request: pytest.FixtureRequest) -> list[tuple[Case, Compiled]]:
    chosen = list(cases(request.param))
    if request.param not in EVERY_CASE:
        chosen = list({case.kernel: case for case in reversed(chosen)}.values())
    with ThreadPoolExecutor(2) as pool:
        return list(zip(chosen, pool.map(lambda case: case.compile(request.param), chosen), strict=True))


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
