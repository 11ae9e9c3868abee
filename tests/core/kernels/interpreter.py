"""A test file again, in a process in which Triton interprets kernels: it reads ``TRITON_INTERPRET`` when they are
defined, and the process that runs the other tests compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def assert_passes_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
