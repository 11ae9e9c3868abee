"""What a short cut costs: the same seeds drawn with and without it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robuq_core.config import SamplerName
from robuq_core.pipeline import ALL_TIMESTEPS, Row, RowSpec, Sampler


@dataclass(frozen=True)
class Comparison:
    """``psnr_db``: of the pictures against those without the short cut, infinite where they are the same.
    ``rows``, ``rows_full``: model rows that were run with and without it; ``seconds`` likewise."""

    images: int
    psnr_db: float
    rows: int
    rows_full: int
    seconds: float
    seconds_full: float


def compare_guidance_interval(
    sampler: Sampler,
    class_ids: Sequence[int],
    interval: tuple[int, int],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler_name: SamplerName | None = None,
) -> Comparison:
    """Pictures of ``class_ids`` with guidance inside of ``interval`` alone, against guidance at every timestep.

    Image i uses ``seed + i``; what is ``None`` takes the checkpoint's default.

    Raises:
        ValueError: a value out of range, or a guidance scale of 1, which is no guidance.
    """
    defaults = sampler.defaults
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    if scale == 1:
        raise ValueError("guidance_scale 1 is no guidance, so its interval changes nothing: choose another scale")

    def draw(chosen: tuple[int, int]) -> tuple[np.ndarray, int, float]:
        specs = [
            RowSpec(class_id, seed + i, steps or defaults.steps, scale, sampler_name or defaults.sampler, chosen)
            for i, class_id in enumerate(class_ids)
        ]
        began = time.perf_counter()
        rows = [sampler.start(spec) for spec in specs]
        model_rows = 0
        while not rows[0].done:
            model_rows += _model_rows(rows)
            sampler.step(rows)
        seconds = time.perf_counter() - began
        return np.stack([sampler.decode(row) for row in rows]), model_rows, seconds

    full, rows_full, seconds_full = draw(ALL_TIMESTEPS)
    cut, rows, seconds = draw(interval)
    return Comparison(len(class_ids), psnr_db(cut, full), rows, rows_full, seconds, seconds_full)


def _model_rows(rows: Sequence[Row]) -> int:
    return sum(2 if row.guided else 1 for row in rows)


def psnr_db(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 ``images`` against ``reference``, same shape: ``10 log10(255^2 / MSE)``."""
    error = float(np.mean((images.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
