"""The jobs of ``scripts/gpu_run.py``: functions that record what they find."""
