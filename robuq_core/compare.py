"""What a guidance interval or step caching saves and costs: the same seeds generated with and without."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from robuq_core.params import ALL_TIMESTEPS, ImageParams, RowSpec, read_params
from robuq_core.pipeline import Sampler


@dataclass(frozen=True)
class Comparison:
    """Of ``images`` with the short cut against those without it; ``_full`` figures are without.

    ``psnr_db``: infinite if they are identical. ``fewer_steps``: steps that cost the same without the short cut, and
    ``fewer_steps_psnr_db`` their PSNR. ``rows``: rows of the model that went through the blocks.
    """

    images: int
    psnr_db: float
    fewer_steps: int
    fewer_steps_psnr_db: float
    rows: int
    rows_full: int
    seconds: float
    seconds_full: float


def compare_short_cuts(sampler: Sampler, class_ids: Sequence[int], **fields: Any) -> Comparison:
    """Images of ``class_ids`` with a guidance interval or step caching, against the same seeds without.

    Args:
        fields: of :class:`robuq_core.params.ImageParams`. Image i uses ``seed + i``; default seed: 0.

    Raises:
        ValueError: no class, no short cut, an interval without guidance, or unsupported fields.
    """
    if not class_ids:
        raise ValueError("class_ids must name at least one class")
    params = read_params(ImageParams, fields).resolved(sampler.defaults, seed=0)
    if params.guidance_interval == ALL_TIMESTEPS and params.cache_interval == 1:
        raise ValueError("there is no short cut to compare: choose a guidance_interval or a cache_interval above 1")
    if params.guidance_interval != ALL_TIMESTEPS and params.guidance_scale == 1:
        raise ValueError("guidance_scale 1 is no guidance, so its interval changes nothing: choose another scale")
    cut = [params.spec(class_id, i) for i, class_id in enumerate(class_ids)]
    whole = [replace(spec, guidance_interval=ALL_TIMESTEPS, cache_interval=1) for spec in cut]
    for specs in (whole, cut):  # refuses what is unsupported, and keeps one-time costs out of the timings
        sampler.step([sampler.start(spec) for spec in specs])
    expected, rows_full, seconds_full = _generate(sampler, whole)
    images, rows, seconds = _generate(sampler, cut)
    steps = max(1, round(whole[0].steps * rows / rows_full))
    fewer, _, _ = _generate(sampler, [replace(spec, steps=steps) for spec in whole])
    psnr, fewer_psnr = psnr_db(images, expected), psnr_db(fewer, expected)
    return Comparison(len(whole), psnr, steps, fewer_psnr, rows, rows_full, seconds, seconds_full)


def _generate(sampler: Sampler, specs: Sequence[RowSpec]) -> tuple[np.ndarray, int, float]:
    """Images, rows of the model that went through the blocks, and seconds of all steps."""
    rows = [sampler.start(spec) for spec in specs]
    block_rows = 0
    sampler.synchronize()
    began = time.perf_counter()
    while not rows[0].done:
        block_rows += sum(row.block_rows for row in rows)
        sampler.step(rows)
    sampler.synchronize()
    seconds = time.perf_counter() - began
    return np.stack([sampler.decode(row) for row in rows]), block_rows, seconds


def psnr_db(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 ``images`` against ``reference``, same shape: ``10 log10(255^2 / MSE)``."""
    error = float(np.mean((images.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
