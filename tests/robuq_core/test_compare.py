"""What guidance in an interval saves and costs, on a tiny checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from robuq_core.compare import compare_guidance_interval, psnr_db
from robuq_core.pipeline import ALL_TIMESTEPS, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    path: Path = tmp_path_factory.mktemp("compare") / "tiny.safetensors"
    write_tiny(path)
    return Sampler.from_checkpoint(path, threads=1)


def test_the_whole_interval_is_plain_guidance(sampler: Sampler) -> None:
    result = compare_guidance_interval(sampler, [1, 2, 3], ALL_TIMESTEPS, guidance_scale=2.0)
    assert (result.images, result.rows, result.rows_full) == (3, 24, 24)
    assert result.psnr_db == math.inf


def test_an_interval_saves_rows_and_changes_pictures(sampler: Sampler) -> None:
    # Four steps at 999, 666, 333 and 0: two of them are guided.
    result = compare_guidance_interval(sampler, [1, 2, 3], (300, 700), guidance_scale=2.0)
    assert (result.rows, result.rows_full) == (18, 24)
    assert 0 < result.psnr_db < 80
    near = compare_guidance_interval(sampler, [1, 2, 3], (300, 700), guidance_scale=1.01)
    assert near.psnr_db > result.psnr_db


def test_no_guidance_has_no_interval(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="guidance_scale 1 is no guidance"):
        compare_guidance_interval(sampler, [1], (0, 500), guidance_scale=1.0)


def test_psnr_is_of_the_mean_square() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == math.inf
    assert psnr_db(black + 255, black) == 0
    assert psnr_db(black + 51, black) == pytest.approx(10 * math.log10(25))
