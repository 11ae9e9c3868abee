"""One step, whatever fails of it: who moves, who is at fault, and how large the forwards are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.pipeline import RowSpec
from server.fake import FakeRow, FakeSampler
from server.stepping import GROW_AFTER, RowBudget, Stepper, is_out_of_memory


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


class Card(FakeSampler):
    """Has memory for ``room`` rows of the model, and trips over the rows whose seeds are in ``bad``."""

    def __init__(self, room: int, bad: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.room, self.bad = room, bad
        self.tried: list[int] = []

    def step(self, rows: Sequence[FakeRow]) -> None:
        size = sum(2 if row.guided else 1 for row in rows)
        self.tried.append(size)
        if size > self.room:
            raise OutOfMemoryError(f"{size} rows")
        if any(row.spec.seed in self.bad for row in rows):
            raise ValueError("a bad row")
        super().step(rows)


def make_rows(guided: Sequence[bool]) -> list[FakeRow]:
    return [FakeRow(RowSpec(0, seed, 4, 1.5 if two else 1.0, "ddim")) for seed, two in enumerate(guided)]


@given(
    guided=st.lists(st.booleans(), min_size=1, max_size=20),
    room=st.integers(2, 40),
    bad=st.frozensets(st.integers(0, 19), max_size=4),
    budget=st.integers(1, 40),
)
def test_every_good_row_moves_once_and_every_bad_one_is_named(
    guided: list[bool], room: int, bad: frozenset[int], budget: int
) -> None:
    rows = make_rows(guided)
    card = Card(room, bad)
    stepper = Stepper(budget)
    faulty = stepper.step(card, rows)
    assert set(faulty) == {i for i in range(len(rows)) if i in bad}
    assert all(isinstance(error, ValueError) for error in faulty.values())
    assert [row.steps_done for row in rows] == [0 if i in bad else 1 for i in range(len(rows))]
    # Only a single image may exceed the budget.
    assert max(card.tried) <= max(budget, 2)
    assert stepper.budget.rows <= max(budget, 1)
    measured = stepper.take_measured()
    assert sum(size for size, _ in measured) == sum(1 + two for i, two in enumerate(guided) if i not in bad)
    assert stepper.take_measured() == []


class Cached(FakeRow):
    """Runs its blocks at every other step."""

    @property
    def block_rows(self) -> int:
        return 0 if self.steps_done % 2 else super().block_rows


def test_a_step_is_measured_by_the_rows_that_ran_the_blocks() -> None:
    spec = RowSpec(0, 0, 4, 1.5, "ddim")
    stepper, rows = Stepper(16), [Cached(spec), FakeRow(spec), Cached(spec)]
    stepper.step(FakeSampler(), rows)
    stepper.step(FakeSampler(), rows)
    stepper.step(FakeSampler(), [rows[0]])
    stepper.step(FakeSampler(), [rows[0]])
    assert [size for size, _ in stepper.take_measured()] == [6, 2, 2, 0]


def test_no_memory_halves_the_budget_and_full_forwards_win_it_back() -> None:
    card = Card(room=5)
    stepper = Stepper(16)
    rows = make_rows([False] * 16)
    assert stepper.step(card, rows) == {}
    assert card.tried == [16, 8, 4, 4, 4, 4]
    assert stepper.budget.rows == 4
    card.room = 16
    card.tried.clear()
    steps = 0
    while stepper.budget.rows < 16:
        stepper.step(card, rows)
        steps += 1
    assert max(card.tried) == 16 - 1
    assert GROW_AFTER < steps < 12 * GROW_AFTER
    assert stepper.step(card, rows) == {}
    assert card.tried[-1] == 16


def test_an_image_that_does_not_fit_alone_is_at_fault() -> None:
    faulty = Stepper(4).step(Card(room=1), make_rows([True, False]))
    assert list(faulty) == [0]
    assert is_out_of_memory(faulty[0])


def test_small_forwards_say_nothing_about_a_larger_budget() -> None:
    budget = RowBudget(8)
    budget.out_of_memory(8)
    for _ in range(10 * GROW_AFTER):
        budget.fitted(2, 0.01)
    assert budget.rows == 4
    for _ in range(GROW_AFTER):
        budget.fitted(3, 0.01)
    assert budget.rows == 5


def test_forwards_are_measured_and_further_ones_of_a_step_are_announced() -> None:
    now = [10.0]
    retries: list[float] = []
    stepper = Stepper(4, clock=lambda: now[0], on_retry=lambda: retries.append(now[0]))

    def look(rows: Sequence[FakeRow]) -> None:
        now[0] += 3
        if len(rows) > 1:
            raise RuntimeError

    stepper.step(FakeSampler(on_step=look), make_rows([False]))
    assert stepper.take_measured() == [(1, 3.0)]
    assert retries == []
    stepper.step(FakeSampler(on_step=look), make_rows([False, False]))
    assert stepper.take_measured() == [(1, 3.0), (1, 3.0)]
    assert retries == [16.0, 19.0]  # so that a step of many halves does not seem to hang


@pytest.mark.parametrize(
    ("fixed_s", "row_s", "target_s", "most"), [(0.0, 0.004, 0.021, 5), (0.01, 0.001, 0.02, 10), (0.5, 0.1, 0.02, 1)]
)
def test_a_target_time_is_kept_and_one_slow_step_does_not_keep_batches_small(
    fixed_s: float, row_s: float, target_s: float, most: int
) -> None:
    budget, late = RowBudget(32, target_s), 0
    budget.restart(32, fixed_s + row_s * 32)
    for _ in range(3):
        budget.fitted(budget.admitted, fixed_s + row_s * budget.admitted)
    assert 0.7 * most <= budget.admitted <= most
    budget.fitted(budget.admitted, 10 * target_s)
    assert budget.admitted <= max(1, most // 10)
    for _ in range(most * GROW_AFTER):
        seconds = fixed_s + row_s * budget.admitted
        budget.fitted(budget.admitted, seconds)
        late += seconds > target_s
    assert 0.7 * most <= budget.admitted <= most + 1
    assert most == 1 or late <= most
    assert budget.rows == 32  # batches under way are not divided for it
