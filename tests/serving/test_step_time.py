"""The curve of step times: monotone, close to what was seen, and a budget that recovers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.stepping import FORGET_AFTER, StepTimeCurve

STEPS = st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 10)), min_size=1, max_size=60)


@given(STEPS)
def test_more_rows_never_take_less(steps: list[tuple[int, float]]) -> None:
    curve = StepTimeCurve()
    for rows, seconds in steps:
        curve.observe(rows, seconds)
    times = [curve.seconds(rows) for rows in range(1, 100)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(times))
    largest = max(rows for rows, _ in steps)
    low, high = min(seconds for _, seconds in steps), max(seconds for _, seconds in steps)
    assert all(low - 1e-9 <= seconds <= high + 1e-9 for seconds in times[:largest])


@given(STEPS, st.floats(1e-4, 20), st.integers(1, 128))
def test_the_budget_is_the_largest_that_fits(steps: list[tuple[int, float]], target_s: float, max_rows: int) -> None:
    curve = StepTimeCurve()
    for rows, seconds in steps:
        curve.observe(rows, seconds)
    budget = curve.rows_within(target_s, max_rows)
    assert 1 <= budget <= max_rows
    assert budget == 1 or curve.seconds(budget) <= target_s
    assert budget == max_rows or curve.seconds(budget + 1) > target_s


@given(st.floats(0, 0.1), st.floats(1e-4, 0.01), st.sets(st.integers(1, 64), min_size=2))
def test_a_straight_line_is_found_again(fixed_s: float, row_s: float, sizes: set[int]) -> None:
    curve = StepTimeCurve()
    for rows in sizes:
        curve.observe(rows, fixed_s + row_s * rows)
    for rows in range(min(sizes), max(sizes) + 1):
        assert curve.seconds(rows) == pytest.approx(fixed_s + row_s * rows)
    assert curve.seconds(1) >= fixed_s + row_s - 1e-12
    assert curve.seconds(200) >= fixed_s + row_s * 200 - 1e-9


def test_before_any_step_there_is_no_limit() -> None:
    assert StepTimeCurve().seconds(8) == 0.0
    assert StepTimeCurve().rows_within(0.01, 32) == 32


def test_the_mean_follows_a_machine_that_becomes_slower() -> None:
    curve = StepTimeCurve()
    curve.observe(8, 0.1)
    for _ in range(50):
        curve.observe(8, 0.3)
    assert curve.seconds(8) == pytest.approx(0.3, rel=0.01)


def test_one_slow_step_does_not_keep_batches_small_for_ever() -> None:
    def true_seconds(rows: int) -> float:
        return 0.01 + 0.001 * rows

    curve = StepTimeCurve()
    for rows in (1, 2, 4, 8, 16, 32):
        curve.observe(rows, true_seconds(rows))
    assert curve.rows_within(0.05, 32) == 32
    for _ in range(5):
        curve.observe(32, 1.0)
    assert curve.rows_within(0.05, 32) < 20
    for _ in range(20 * FORGET_AFTER):
        budget = curve.rows_within(0.05, 32)
        curve.observe(budget, true_seconds(budget))
        if budget == 32:
            return
    raise AssertionError("the budget did not recover")


@pytest.mark.parametrize(("rows", "seconds"), [(0, 0.1), (1, -0.1), (1, float("nan")), (1, float("inf"))])
def test_nonsense_is_refused(rows: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="a step needs"):
        StepTimeCurve().observe(rows, seconds)
