"""How many CPUs this process may use: the default number of threads of torch and of the native kernels."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_OPENMP = "OMP_NUM_THREADS"


def available_cpus() -> int:
    """The CPUs of the affinity mask, or the container's CPU quota, rounded up, if that is less."""
    quota = cpu_quota()
    return _allowed_cpus() if quota is None else max(1, min(_allowed_cpus(), math.ceil(quota)))


def _allowed_cpus() -> int:
    # macOS has no affinity mask.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> float | None:
    """The lowest CPU quota of this process's control group and its parents, in CPUs; ``None`` without a limit.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``). In a container the own group is often mounted
    at ``cgroups`` itself while ``membership`` names the path on the host: missing folders are skipped.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    files: tuple[str, ...]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, files = (cgroups, cgroups / "unified"), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            mounts, files = (cgroups / controllers, cgroups / "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        inside = Path(path.strip("/"))
        quotas += [_quota(mount / folder, files) for mount in mounts for folder in (inside, *inside.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    """Quota over period, the two numbers in ``files``; None for no limit (``max`` or -1) and missing files."""
    try:
        quota, period = (number for name in files for number in (folder / name).read_text().split())
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def limit_threads() -> None:
    """Limit torch to :func:`available_cpus`, unless ``OMP_NUM_THREADS`` is set.

    torch counts CPUs and ignores the quota: its threads would wait for each other whenever the quota is used up.
    """
    cpus = available_cpus()
    if _OPENMP in os.environ or cpus == _allowed_cpus():
        return
    torch = sys.modules.get("torch")
    if torch is None:  # OpenMP reads it once, when torch is imported; child processes inherit it
        os.environ[_OPENMP] = str(cpus)
    elif torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
