"""What guidance in an interval and step caching save and cost, on a tiny checkpoint."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny

from robuq_core.compare import compare_short_cuts, psnr_db
from robuq_core.pipeline import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    path: Path = tmp_path_factory.mktemp("compare") / "tiny.safetensors"
    write_tiny(path)
    return Sampler.from_checkpoint(path, threads=1)


def test_an_interval_saves_rows_and_changes_pictures(sampler: Sampler) -> None:
    # Four steps at 999, 666, 333 and 0: two of them are guided.
    result = compare_short_cuts(sampler, [1, 2, 3], guidance_interval=(300, 700), guidance_scale=2.0)
    assert (result.images, result.rows, result.rows_full, result.fewer_steps) == (3, 18, 24, 3)
    assert 0 < result.psnr_db < 80
    near = compare_short_cuts(sampler, [1, 2, 3], guidance_interval=(300, 700), guidance_scale=1.01)
    assert near.psnr_db > result.psnr_db


def test_caching_saves_rows_and_changes_pictures(sampler: Sampler) -> None:
    # Of four steps the first and, back from the last, every third run the blocks.
    result = compare_short_cuts(sampler, [1, 2, 3], cache_interval=3, guidance_scale=2.0)
    assert (result.rows, result.rows_full, result.fewer_steps) == (12, 24, 2)
    assert 0 < result.psnr_db < 80
    assert 0 < result.fewer_steps_psnr_db < 80
    both = compare_short_cuts(sampler, [1], guidance_interval=(0, 700), cache_interval=3, guidance_scale=2.0)
    assert (both.rows, both.rows_full) == (5, 8)  # guidance sets in at 666, where no kept delta is without a class


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"guidance_interval": (0, 500), "guidance_scale": 1.0}, "guidance_scale 1 is no guidance"),
        ({}, "no short cut to compare"),
        ({"cache_interval": 2, "steps": 0}, "steps must be"),
        ({"cache_interval": 0}, "cache_interval"),
    ],
)
def test_what_compares_nothing_is_refused(sampler: Sampler, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_short_cuts(sampler, [1], **chosen)
    with pytest.raises(ValueError, match="class_ids must name"):
        compare_short_cuts(sampler, [], cache_interval=2)


def test_psnr_is_of_the_mean_square() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == math.inf
    assert psnr_db(black + 255, black) == 0
    assert psnr_db(black + 51, black) == pytest.approx(10 * math.log10(25))
