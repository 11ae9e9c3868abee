"""Threads of torch and of the native kernels: how many CPUs this process may use, and who runs on them when."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
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
    """The lowest quota in ``cpu.max`` of this process's control group and its parents, in CPUs; None without a limit.

    In a container the own group is often mounted at ``cgroups`` itself while ``membership`` names the path on the
    host: missing folders are skipped.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    inside = [Path(line.removeprefix("0::").strip("/")) for line in lines if line.startswith("0::")]
    quotas = [_quota(cgroups / folder / "cpu.max") for path in inside for folder in (path, *path.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(path: Path) -> float | None:
    """``max 100000`` and files that cannot be read: no limit."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
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


def sleep_between_regions() -> None:
    """Let torch's threads sleep between parallel regions, unless ``OMP_WAIT_POLICY`` is set.

    By default they keep spinning for a while, on cores that the native kernels need next. OpenMP reads its settings
    once: call this before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@lru_cache(maxsize=1)
def _openmp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no access to the process's own symbols
        return None
    return library if hasattr(library, "omp_set_num_threads") else None


@contextmanager
def on_one_thread(wanted: bool = True) -> Iterator[None]:
    """Run torch's operators of the calling thread on one thread, if torch uses OpenMP and ``wanted``.

    :func:`torch.set_num_threads` would also affect threads that start meanwhile.
    """
    library = _openmp() if wanted else None
    if library is None:
        yield
        return
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
