"""Intervals against known quantiles and their own coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.evaluation.intervals import Estimate, ratio, student_t


@pytest.mark.parametrize(
    ("degrees", "point"), [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)]
)
def test_quantiles_of_student(degrees: int, point: float) -> None:
    assert student_t(degrees) == pytest.approx(point, abs=1e-3)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3, 2, (4000, 3))
    estimates = [Estimate(tuple(row)) for row in draws.tolist()]
    covered = [abs(each.mean - 3) <= (each.half_width or 0) for each in estimates]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval() -> None:
    assert Estimate((2.0,)).as_dict() == {"mean": 2.0, "interval": None, "by_seed": [2.0]}


@given(st.lists(st.floats(1, 100), min_size=2, max_size=8), st.floats(0.1, 10))
def test_a_ratio_is_taken_seed_by_seed(base: list[float], factor: float) -> None:
    found = ratio([factor * each for each in base], base)
    assert found is not None
    assert found.values == pytest.approx([factor] * len(base))
    assert found.half_width == pytest.approx(0, abs=1e-9)


def test_there_is_no_ratio_to_zero() -> None:
    assert ratio([1.0], [0.0]) is None
