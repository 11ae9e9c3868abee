"""How many processors this process may use: the default number of threads, of torch and of the native kernels alike."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_OPENMP = "OMP_NUM_THREADS"


def available_cpus() -> int:
    """The processors of the affinity mask, or the container's CPU quota, rounded up, if that is less."""
    quota = cpu_quota()
    return _allowed_cpus() if quota is None else max(1, min(_allowed_cpus(), math.ceil(quota)))


def _allowed_cpus() -> int:
    # macOS has no affinity mask.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> float | None:
    """The least CPU quota of this process's control group and those above it, in CPUs; ``None`` without a limit.

    Version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``). Inside a container its own group is often mounted at
    ``cgroups`` itself, while ``membership`` names the path on the host: folders that are absent are passed over.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, read = (cgroups, cgroups / "unified"), _version_2
        elif "cpu" in controllers.split(","):
            mounts, read = (cgroups / controllers, cgroups / "cpu"), _version_1
        else:
            continue
        inside = Path(path.strip("/"))
        quotas += [read(mount / folder) for mount in mounts for folder in (inside, *inside.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _version_1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def limit_threads() -> None:
    """Keep torch to :func:`available_cpus`, unless ``OMP_NUM_THREADS`` is set.

    torch counts processors, not the quota: its threads would wait for each other whenever the quota is used up.
    """
    cpus = available_cpus()
    if _OPENMP in os.environ or cpus == _allowed_cpus():
        return
    torch = sys.modules.get("torch")
    if torch is None:  # OpenMP reads it once, when torch is imported; child processes inherit it
        os.environ[_OPENMP] = str(cpus)
    elif torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
