"""Threads follow the affinity mask and the CPU quota of a control group; torch makes way for native kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from robuq_core import threads
from robuq_core.pipeline import RowSpec, Sampler
from robuq_core.threads import on_one_thread


@pytest.mark.parametrize(
    ("groups", "membership", "expected"),
    [
        ({"": "max 100000"}, "0::/", None),
        ({"": "250000 100000"}, "0::/", 2.5),
        ({"pods": "150000 100000", "pods/one": "400000 100000"}, "0::/pods/one", 1.5),  # the lowest on the way up
        ({"": "50000 100000"}, "0::/docker/abc", 0.5),  # the host's path, with the own group mounted at the root
        ({"": "50000 100000"}, "2:cpu,cpuacct:/\n", None),  # version 1
        *(({"": unreadable}, "0::/", None) for unreadable in ("", "nonsense", "100000 0", "a b")),
    ],
)
def test_quotas(tmp_path: Path, groups: dict[str, str], membership: str, expected: float | None) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, quota in groups.items():
        (tmp_path / "cgroup" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name / "cpu.max").write_text(f"{quota}\n")
    assert threads.cpu_quota(tmp_path / "membership", tmp_path / "cgroup") == expected
    assert threads.cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"), [(None, 8, 8), (2.0, 8, 2), (2.1, 8, 3), (0.2, 8, 1), (6.0, 4, 4), (None, 1, 1)]
)
def test_the_quota_is_rounded_up(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, allowed: int, expected: int
) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: allowed)
    assert threads.available_cpus() == expected


PROGRAM = """
import os, sys
if "first" in sys.argv: import torch
import robuq_core.threads as threads
threads.cpu_quota = lambda: 0.5
threads._allowed_cpus = lambda: 64
threads.limit_threads()
import torch
from robuq_core.kernels.backends import select_backend
print(torch.get_num_threads(), getattr(select_backend("auto"), "threads", 1))
"""


@pytest.mark.parametrize(("order", "variable", "expected"), [("", {}, "1 1"), ("first", {}, "1 1"),
                                                             ("", {"OMP_NUM_THREADS": "2"}, "2 2")])  # fmt: skip
def test_torch_and_the_native_pool_follow_the_quota_or_the_user(
    order: str, variable: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variable
    command = [sys.executable, "-c", PROGRAM, order]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.fixture
def two_threads() -> Iterator[None]:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch without OpenMP")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_one_thread_is_for_the_block_and_the_calling_thread() -> None:
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


@pytest.mark.usefixtures("two_threads")
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


def test_torch_of_a_server_sleeps_between_regions_unless_set_otherwise() -> None:
    program = "import os, server; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, check=True)
        assert done.stdout.decode().strip() == expected
