"""The jobs of ``scripts/gpu_run.py``: functions of a context that record what they find, by name."""

from gpu_jobs import correctness, programs, speed

JOBS = {job.__name__: job for module in (correctness, speed, programs) for job in module.JOBS}
