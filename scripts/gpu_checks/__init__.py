"""The parts of ``scripts/gpu_check.py``: each takes a :class:`~gpu_checks.check.Check` and gives what it found."""
