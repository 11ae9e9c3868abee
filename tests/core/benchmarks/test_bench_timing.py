"""A timing counts only if the result is right; sides take turns; ratios are those of one round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robuq_core.bench.timing import BenchError, Side, Timer, time_sides

RIGHT = torch.tensor([[3.0, 4.0], [1.0, 2.0]])


class Clock:
    """A clock that stands still but for the seconds that sides spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def side(
        self, name: str, seconds: Callable[[int], float] | float, result: Tensor = RIGHT, **options: object
    ) -> Side:
        calls = 0

        def run() -> Tensor:
            nonlocal calls
            self.now += seconds if isinstance(seconds, int | float) else seconds(calls)
            calls += 1
            self.order.append(name)
            return result

        return Side(name, run, lambda: RIGHT, 0.01, **options)  # type: ignore[arg-type]

    def timer(self, rounds: int = 5, budget_s: float = 1e9) -> Timer:
        return Timer(rounds, budget_s, clock=self, sleep=lambda seconds: None)


def test_medians_and_quartiles_are_of_the_samples() -> None:
    clock = Clock()
    # The first two calls are the check and the warm-up.
    times = [9.0, 9.0, 5.0, 1.0, 4.0, 2.0, 3.0]
    (timing,), absent = time_sides([clock.side("robuq", times.__getitem__, own=True)], clock.timer())
    assert (timing.median_s, timing.p25_s, timing.p75_s, timing.min_s, timing.rounds) == (3.0, 2.0, 4.0, 1.0, 5)
    assert timing.speedup is None
    assert absent == []


def test_speedups_compare_times_of_the_same_round() -> None:
    clock = Clock()
    # Both slow down together, round by round: the ratio stays.
    slow = clock.side("fp32", lambda call: 4.0 * (call + 1))
    fast = clock.side("robuq", lambda call: 1.0 * (call + 1), own=True)
    timings, _ = time_sides([fast, slow], clock.timer())
    assert {timing.name: timing.speedup for timing in timings} == pytest.approx({"fp32": 1.0, "robuq": 4.0})


def test_sides_take_turns_and_none_is_always_first() -> None:
    clock = Clock()
    time_sides([clock.side(name, 1.0) for name in ("fp32", "a", "b")], clock.timer(rounds=3))
    rounds = [clock.order[i : i + 3] for i in range(6, 15, 3)]
    assert [sorted(turn) for turn in rounds] == [["a", "b", "fp32"]] * 3
    assert len({turn[0] for turn in rounds}) == 3


def test_a_turn_begins_warm() -> None:
    """What a side pays after another one has run is not its own time."""
    clock = Clock()

    def seconds_of(name: str) -> Callable[[int], float]:
        return lambda _: 0.1 if clock.order[-1:] == [name] else 0.4

    timings, _ = time_sides([clock.side(name, seconds_of(name)) for name in ("fp32", "robuq")], clock.timer())
    assert [timing.median_s for timing in timings] == pytest.approx([0.1, 0.1])


@given(st.integers(3, 50), st.floats(0, 1000))
def test_rounds_keep_to_the_budget_but_for_three(rounds: int, budget_s: float) -> None:
    clock = Clock()
    timings, _ = time_sides([clock.side("fp32", 3.0), clock.side("robuq", 1.0)], clock.timer(rounds, budget_s))
    assert {timing.rounds for timing in timings} == {max(3, min(rounds, int(budget_s / 4.0)))}


@pytest.mark.parametrize("result", [RIGHT * 1.5, RIGHT.flip(0), RIGHT * torch.nan, RIGHT[:1], -RIGHT])
def test_a_wrong_result_of_ours_ends_the_benchmark(result: Tensor) -> None:
    clock = Clock()
    with pytest.raises(BenchError, match=r"robuq is off by .*No timing is reported"):
        time_sides([clock.side("robuq", 1.0, result, own=True)], clock.timer())


def test_a_hopeless_or_wrong_peer_is_taken_out_but_ours_is_waited_for() -> None:
    clock = Clock()
    sides = [clock.side("int8", 100.0), clock.side("fp32", 1.0), clock.side("robuq", 100.0, own=True)]
    sides.append(clock.side("bf16", 1.0, RIGHT * 1.1))
    timings, absent = time_sides(sides, clock.timer(rounds=3))
    assert [timing.name for timing in timings] == ["fp32", "robuq"]
    assert [a.reason for a in absent] == [
        "one call took 100.0 s, 100 times FP32: not repeated",
        "wrong result: bf16 is off by 0.1 of the norm; at most 0.01 is rounding",
    ]
    assert clock.order.count("int8") == 1


def test_checks_may_look_at_some_images_or_at_more_than_is_timed() -> None:
    whole, part = torch.cat([RIGHT, RIGHT * 7]), RIGHT[:1]
    side = Side("robuq", lambda: whole, lambda: part, 0.01, own=True, images=(0,))
    assert time_sides([side], Timer(3, 0.0))[0][0].relative_error == 0
    side = Side("robuq", lambda: None, lambda: RIGHT, 0.01, own=True, result=lambda: RIGHT)
    assert time_sides([side], Timer(3, 0.0))[0][0].relative_error == 0
