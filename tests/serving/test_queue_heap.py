"""The heap against a sorted list, and its memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.fair_queue import Heap


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 3)), max_size=200))
def test_the_first_is_the_least_and_the_longest_there(operations: list[tuple[bool, int, int]]) -> None:
    heap: Heap[int] = Heap()
    model: dict[int, int] = {}  # in order of insertion
    for is_push, item, key in operations:
        model.pop(item, None)
        if is_push:
            heap.push(key, item)
            model[item] = key
        else:
            heap.discard(item)
        assert len(heap) == len(model)
        assert (item in heap) == is_push
        least = min(model, key=lambda item: model[item], default=None)  # the first of equals
        assert heap.first() == (None if least is None else (model[least], least))


def test_items_taken_out_of_the_middle_leave_nothing_behind() -> None:
    heap: Heap[int] = Heap()
    heap.push(0, -1)
    for item in range(10_000):
        heap.push(1 + item, item)
        heap.discard(item)
        heap.push(item, -2)  # moved again and again
    assert len(heap) == 2
    assert len(heap._entries) < 50
