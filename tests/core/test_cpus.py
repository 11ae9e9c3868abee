"""Threads by default: the affinity mask, and the CPU quota of a control group, of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robuq_core import cpus

V1 = "9:name=systemd:/\n2:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "membership", "expected"),
    [
        ({"": "max 100000"}, "0::/", None),
        ({"": "250000 100000"}, "0::/", 2.5),
        ({"pods": "150000 100000", "pods/one": "400000 100000"}, "0::/pods/one", 1.5),  # the lowest on the way up
        (
            {"": "50000 100000"},
            "0::/docker/abc",
            0.5,
        ),  # the path on the host, in a container with its group at the root
        *(({"": unreadable}, "0::/", None) for unreadable in ("", "nonsense", "100000 0", "a b")),
        ({"cpu,cpuacct": -1}, V1, None),
        ({"cpu,cpuacct/docker/abc": 320_000}, V1, 3.2),
        ({"cpu": 200_000}, "3:cpuacct,cpu:/elsewhere", 2),  # mounted under the short name alone
    ],
)
def test_quotas(tmp_path: Path, groups: dict[str, str | int], membership: str, expected: float | None) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, quota in groups.items():
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(quota, str):
            (folder / "cpu.max").write_text(f"{quota}\n")
        else:  # version 1
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpus.cpu_quota(tmp_path / "membership", tmp_path / "cgroup") == expected
    assert cpus.cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "allowed", "expected"), [(None, 8, 8), (2.0, 8, 2), (2.1, 8, 3), (0.2, 8, 1), (6.0, 4, 4), (None, 1, 1)]
)
def test_the_quota_is_rounded_up(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, allowed: int, expected: int
) -> None:
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cpus, "_allowed_cpus", lambda: allowed)
    assert cpus.available_cpus() == expected


PROGRAM = """
import sys
if "first" in sys.argv: import torch
import robuq_core.cpus as cpus
cpus.cpu_quota = lambda: 0.5
cpus._allowed_cpus = lambda: 64
cpus.limit_threads()
import torch
from robuq_core.kernels.backends import select_backend
print(torch.get_num_threads(), getattr(select_backend("auto"), "threads", 1))
"""


@pytest.mark.parametrize("order", ["", "first"])
def test_torch_and_the_native_pool_follow_it(order: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PROGRAM, order]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 1"


def test_a_number_of_the_users_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(cpus, "_allowed_cpus", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cpus.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
