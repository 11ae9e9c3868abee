"""The table of modulations: entries are what the network computes, shared, kept, and never mixed up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from robuq_core.kernels.ops import Quantized, TernaryLayer
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.conditioning import ConditioningTable, network_ends
from robuq_core.models.dit import DiT, position_table
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.quant.activation import GAUSSIAN_STEP

HEIGHT = 6 * TINY.depth + 2
ENTRY_BYTES = 4 * HEIGHT * TINY.hidden_size


class Counting(ReferenceBackend):
    """Counts the rows of adaLN products, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.fail = False

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> torch.Tensor:
        if self.fail:
            raise MemoryError
        self.rows.append(len(x.codes))
        return super().ternary_linear(x, layer)


@pytest.fixture(scope="module")
def model() -> DiT:
    return tiny_model()


def make_table(model: DiT, slots: int = 8) -> tuple[ConditioningTable, Counting]:
    backend = Counting()
    dense = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("blocks.")}
    adaln = []
    for i in range(TINY.depth):
        linear = model.get_submodule(f"blocks.{i}.adaLN_modulation.1")
        assert isinstance(linear, QuantLinear)
        adaln.append(pack_layer(linear))
    ends = network_ends(TINY, dense, position_table(TINY))
    return ConditioningTable(TINY, dense, adaln, backend, ends, max_bytes=slots * ENTRY_BYTES), backend


@torch.no_grad()
def expected_entry(model: DiT, timestep: int, label: int) -> torch.Tensor:
    c = model.t_embedder(torch.tensor([timestep])) + model.y_embedder(torch.tensor([label]))
    parts = [model.get_submodule(f"blocks.{i}.adaLN_modulation")(c) for i in range(TINY.depth)]
    return torch.cat([*parts, model.final_layer.adaLN_modulation(c)], dim=1).reshape(HEIGHT, -1)


def assert_entry(found: torch.Tensor, model: DiT, timestep: int, label: int) -> None:
    """To rounding in all but one block, where codes next to the edge of their cell may have moved: two at most."""
    expected = expected_entry(model, timestep, label)
    *blocks, final = ((a - b).norm() / b.norm() for a, b in zip(found.split(6), expected.split(6), strict=True))
    assert final < 1e-4
    assert sorted(blocks)[-2] < 1e-4
    assert max(blocks) < 3 * GAUSSIAN_STEP[4] * (2 / TINY.hidden_size) ** 0.5


def test_entries_are_the_training_models_modulations(model: DiT) -> None:
    table, _ = make_table(model)
    timesteps, classes = [0, 999, 0, 17], [3, 3, 10, 3]
    slots = table.slots(timesteps, classes)
    for row, (t, y) in enumerate(zip(timesteps, classes, strict=True)):
        assert_entry(table.table[:, slots[row]], model, t, y)


def test_pairs_are_computed_once(model: DiT) -> None:
    table, backend = make_table(model)
    slots = table.slots([5, 5, 6, 5], [1, 1, 1, 1])
    assert len(set(slots.tolist())) == 2
    assert backend.rows == [2] * TINY.depth
    table.slots([6, 7, 5], [1, 1, 1])
    assert backend.rows == [2] * TINY.depth + [1] * TINY.depth


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6), max_size=8),
    st.integers(1, 8),
)
def test_entries_hold_whatever_came_before(model: DiT, calls: list[list[tuple[int, int]]], capacity: int) -> None:
    table, _ = make_table(model, capacity)
    for pairs in calls:
        slots = table.slots([t for t, _ in pairs], [y for _, y in pairs])
        for row, (t, y) in enumerate(pairs):
            assert_entry(table.table[:, slots[row]], model, t, y)


def test_the_least_recently_used_makes_room(model: DiT) -> None:
    table, backend = make_table(model, slots=2)
    table.slots([1, 2], [0, 0])
    table.slots([1], [0])
    table.slots([3], [0])  # in place of timestep 2
    backend.rows.clear()
    table.slots([1, 3], [0, 0])
    assert backend.rows == []
    table.slots([2], [0])
    assert backend.rows == [1] * TINY.depth


def test_a_failure_leaves_no_hollow_entry(model: DiT) -> None:
    table, backend = make_table(model, slots=2)
    backend.fail = True
    with pytest.raises(MemoryError):
        table.slots([1, 2], [0, 0])
    backend.fail = False
    slots = table.slots([1, 2], [0, 0])
    for row, t in enumerate([1, 2]):
        assert_entry(table.table[:, slots[row]], model, t, 0)
