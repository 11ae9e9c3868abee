"""The jobs of ``scripts/gpu_run.py``: functions of a :class:`~gpu_jobs.context.Context` that record what they find."""

from __future__ import annotations

from pathlib import Path


def run_job(name: str, out: Path, rehearse: bool, share: str) -> None:
    """Run a job in this process.

    Raises:
        SystemExit: there is no such job.
    """
    from gpu_jobs import correctness, programs, speed
    from gpu_jobs.context import Context

    jobs = {job.__name__: job for job in (*correctness.JOBS, *speed.JOBS, *programs.JOBS)}
    if name not in jobs:
        raise SystemExit(f"no job {name!r}: choose one of {', '.join(jobs)}")
    part, parts = map(int, share.split("/"))
    with Context(name, out, rehearse, part, parts) as context:
        jobs[name](context)
