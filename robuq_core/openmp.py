"""How the threads of torch's OpenMP wait for work. It reads its settings once: this comes before torch is imported."""

from __future__ import annotations

import os


def sleep_between_regions() -> None:
    """Let torch's threads sleep between parallel regions, unless ``OMP_WAIT_POLICY`` says otherwise.

    By default they go on spinning for a while, on the cores that the native kernels' own threads want next.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
