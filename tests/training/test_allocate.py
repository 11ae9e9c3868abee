import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from train.allocate import (
    METHODS,
    PAPER_AVERAGES,
    Allocation,
    AllocationError,
    Resampled,
    allocate,
    averages_by_type,
    layer_table,
    plot_allocations,
    resample,
    type_table,
)

LOSS = st.floats(-1, 1, allow_nan=False)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], dict[str, int], float]:
    """Up to five layers with three or four widths each, and a budget that the smallest widths meet."""
    count = draw(st.integers(1, 5))
    widths = draw(st.sampled_from([(1, 2, 3, 4), (1, 2, 4), (2, 3, 8)]))
    scale = draw(st.sampled_from([1, 7, 10**9]))
    losses = {f"l{i}": {width: draw(LOSS) for width in widths} for i in range(count)}
    macs = {name: scale * draw(st.integers(1, 9)) for name in losses}
    return losses, macs, draw(st.integers(10 * widths[0], 45)) / 10


@given(problems())
def test_programming_finds_what_trying_everything_finds(problem: tuple) -> None:
    losses, macs, budget = problem
    names, total = list(losses), sum(macs.values())
    feasible = []
    for choice in itertools.product(*(losses[name] for name in names)):
        cost = sum(macs[name] * width for name, width in zip(names, choice, strict=True))
        if 10 * cost <= round(10 * budget) * total:
            feasible.append(sum(losses[name][width] for name, width in zip(names, choice, strict=True)))
    assert allocate(losses, macs, budget).predicted_loss == pytest.approx(min(feasible), abs=1e-9)


@given(problems())
def test_no_method_is_over_budget_and_none_beats_programming(problem: tuple) -> None:
    losses, macs, budget = problem
    best = allocate(losses, macs, budget)
    for method in METHODS:
        found = allocate(losses, macs, budget, method)
        assert set(found.bits) == set(losses)
        assert sum(macs[name] * width for name, width in found.bits.items()) * 10 <= round(10 * budget) * sum(
            macs.values()
        )
        assert found.average_bits <= budget + 1e-9
        assert found.predicted_loss >= best.predicted_loss - 1e-9


def test_greedy_is_caught_by_a_first_step_that_leaves_no_room() -> None:
    # Width 2 of the small layer gains most per MAC, and then the large layer no longer fits.
    losses = {"small": {1: 1.0, 2: 0.0}, "large": {1: 3.0, 2: 1.0}}
    macs = {"small": 1, "large": 3}
    budget = 1.75
    assert allocate(losses, macs, budget, "greedy").bits == {"small": 2, "large": 1}
    assert allocate(losses, macs, budget).bits == {"small": 1, "large": 2}


def test_a_model_as_large_as_the_paper_s_is_solved_exactly() -> None:
    # Loss halves with every bit, weighed by type: what loses most for its cost gets most.
    weights, costs = {"qkv": 2.0, "proj": 1.0, "fc1": 1.5, "fc2": 1.0}, {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}
    names = [f"blocks.{i}.{kind}" for i in range(28) for kind in weights]
    losses = {name: {b: weights[name.rpartition(".")[2]] * 2.0**-b for b in (1, 2, 3, 4)} for name in names}
    macs = {name: costs[name.rpartition(".")[2]] * 339_738_624 for name in names}
    found = allocate(losses, macs, 2)
    assert 1.99 < found.average_bits <= 2
    means = averages_by_type(found.bits)
    assert means["proj"] >= means["qkv"] > means["fc1"] >= means["fc2"]
    assert found.predicted_loss < allocate(losses, macs, 2, "uniform").predicted_loss


def test_a_budget_that_nothing_meets_is_named() -> None:
    with pytest.raises(AllocationError, match=r"allocate\.average_bits 1\.5 .* sensitivity\.bits"):
        allocate({"a": {2: 0.1}}, {"a": 5}, 1.5)
    with pytest.raises(AllocationError, match="uniform"):
        allocate({"a": {1: 0.1}, "b": {2: 0.0}}, {"a": 5, "b": 1}, 4, "uniform")


def test_tables_show_every_layer_and_the_paper_beside() -> None:
    losses = {f"blocks.{i}.{kind}": {1: 1.0, 2: 0.5, 3: 0.2} for i in range(2) for kind in PAPER_AVERAGES[2]}
    found = [allocate(losses, dict.fromkeys(losses, 1), 2, method) for method in METHODS]
    console = Console(width=120, record=True, file=io.StringIO())
    by_batch = {name: {width: [loss] for width, loss in row.items()} for name, row in losses.items()}
    interval = resample(by_batch, (1,), dict.fromkeys(losses, 1), found[0], resamples=2)
    console.print(type_table(found), layer_table(found, interval))
    text = console.export_text()
    assert "2.75" in text
    assert all(name in text for name in losses)
    assert "dynamic programming" in text


def test_the_plot_is_a_whole_picture(tmp_path: Path) -> None:
    losses = {f"blocks.{i}.attn.{kind}": {1: 1.0, 2: 0.5, 3: 0.2} for i in range(3) for kind in PAPER_AVERAGES[2]}
    path = tmp_path / "bits.png"
    plot_allocations([allocate(losses, dict.fromkeys(losses, 1), 2, method) for method in METHODS], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_resampling_keeps_what_every_batch_agrees_on_and_doubts_the_rest() -> None:
    macs = dict.fromkeys("abcd", 1)
    sure = {1: [4.0] * 8, 2: [1.0] * 8, 3: [0.5] * 8}
    flat = {1: [0.1] * 8, 2: [0.05] * 8, 3: [0.04] * 8}
    noisy = {1: [1.0] * 8, 2: [0.9, 0.1] * 4, 3: [0.05] * 8}
    by_batch = {"a": sure, "b": flat, "c": noisy, "d": {b: row[::-1] for b, row in noisy.items()}}
    sizes = (4,) * 8
    losses = {name: {b: sum(row) / len(row) for b, row in table.items()} for name, table in by_batch.items()}
    chosen = allocate(losses, macs, 2)
    found = resample(by_batch, sizes, macs, chosen, resamples=100)
    assert found == resample(by_batch, sizes, macs, chosen, resamples=100)
    assert found.batches == 8
    assert found.kept["b"] == 1
    assert found.bits["b"] == (chosen.bits["b"],) * 2
    assert min(found.kept["c"], found.kept["d"]) < 1
    assert found.gain is not None
    low, middle, high = found.gain
    uniform = allocate(losses, macs, 2, "uniform").predicted_loss
    assert low - 1e-9 <= uniform - chosen.predicted_loss <= high + 1e-9
    assert low <= middle <= high
    assert any(f"{kept:.0%}" in " ".join(layer_table_text(chosen, found)) for kept in found.kept.values())


def layer_table_text(chosen: Allocation, found: Resampled) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(layer_table([chosen], found))
    return console.export_text().split()


def test_without_a_uniform_width_there_is_no_gain() -> None:
    by_batch = {"a": {1: [1.0, 2.0]}, "b": {2: [0.5, 0.5]}}
    chosen = allocate({"a": {1: 1.5}, "b": {2: 0.5}}, {"a": 1, "b": 1}, 2)
    assert resample(by_batch, (3, 3), {"a": 1, "b": 1}, chosen, resamples=5).gain is None
