"""Torch's threads beside those of the native kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from robuq_core.openmp import on_one_thread
from robuq_core.pipeline import RowSpec, Sampler

pytestmark = pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_torch_keeps_to_the_thread_within_and_to_its_number_after() -> None:
    seen = []
    with on_one_thread():
        assert torch.get_num_threads() == 1
        with on_one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert torch.get_num_threads() == 2
    assert seen == [2]
    with on_one_thread(False):
        assert torch.get_num_threads() == 2


def test_a_step_of_native_kernels_has_torch_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, expected in (("cpu", 1), ("reference", 2)):
        sampler = Sampler.from_checkpoint(backend=backend)
        seen, denoise = [], sampler.model._run  # type: ignore[attr-defined]

        def look(*tensors: torch.Tensor, denoise=denoise, seen=seen) -> torch.Tensor:  # type: ignore[no-untyped-def]
            seen.append(torch.get_num_threads())
            return denoise(*tensors)

        monkeypatch.setattr(sampler.model, "_run", look)
        sampler.step([sampler.start(RowSpec(207, 0, 1, 1.0, "ddim"))])
        assert seen == [expected]


def test_a_server_s_torch_sleeps_between_regions_unless_told() -> None:
    program = "import os, server; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, check=True)
        assert done.stdout.decode().strip() == expected
