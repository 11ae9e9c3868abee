"""Threads by default: the affinity mask, and the CPU quota of a control group, of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robuq_core import cpus


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def _v1(quota: int) -> dict[str, str]:
    return {"cpu__cfs_quota_us": str(quota), "cpu__cfs_period_us": "100000"}


def _quota(tmp_path: Path, membership: str) -> float | None:
    (tmp_path / "membership").write_text(membership)
    return cpus.cpu_quota(tmp_path / "membership", tmp_path / "cgroup")


def test_version_2(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup", cpu__max="max 100000")
    assert _quota(tmp_path, "0::/\n") is None
    _group(tmp_path / "cgroup", cpu__max="250000 100000")
    assert _quota(tmp_path, "0::/\n") == 2.5


def test_the_least_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    _group(tmp_path / "cgroup")
    _group(tmp_path / "cgroup/pods", cpu__max="150000 100000")
    _group(tmp_path / "cgroup/pods/one", cpu__max="400000 100000")
    assert _quota(tmp_path, "0::/pods/one\n") == 1.5
    # The path on the host, in a container that sees its own group at the root.
    _group(tmp_path / "cgroup", cpu__max="50000 100000")
    assert _quota(tmp_path, "0::/docker/abc\n") == 0.5


def test_version_1(tmp_path: Path) -> None:
    lines = "9:name=systemd:/\n2:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n0::/\n"
    _group(tmp_path / "cgroup/cpu,cpuacct", **_v1(-1))
    assert _quota(tmp_path, lines) is None
    _group(tmp_path / "cgroup/cpu,cpuacct/docker/abc", **_v1(320_000))
    assert _quota(tmp_path, lines) == 3.2
    _group(tmp_path / "cgroup/cpu", **_v1(200_000))  # mounted under the short name alone
    assert _quota(tmp_path, "3:cpuacct,cpu:/elsewhere\n") == 2


@pytest.mark.parametrize("content", ["", "nonsense", "100000 0", "a b"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, content: str) -> None:
    _group(tmp_path / "cgroup", cpu__max=content)
    assert _quota(tmp_path, "0::/\n") is None
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
