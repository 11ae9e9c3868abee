"""No hot kernel takes 5% more instructions than ``instruction_counts.json`` says; to store new counts after a change
that is meant, run ``python tests/core/kernels/instruction_counts.py``."""

from __future__ import annotations

import instruction_counts
import pytest

from robuq_core.kernels.cpu import Isa


@pytest.mark.slow
@pytest.mark.parametrize("isa", instruction_counts.ISAS)
def test_kernels_take_no_more_instructions_than_before(isa: Isa) -> None:
    if reason := instruction_counts.missing(isa):
        pytest.skip(reason)
    before = instruction_counts.stored()[isa]
    if (compiler := instruction_counts.compiler(isa)) != before["compiler"]:
        pytest.skip(f"the counts are of {before['compiler']}, not of {compiler}")
    assert not instruction_counts.higher(instruction_counts.count(isa), before["counts"])


def test_six_percent_more_is_found_and_four_is_not() -> None:
    before = {"a": 1000, "b": 1000, "c": 1000}
    assert instruction_counts.higher({"a": 1040, "b": 500, "c": 1000}, before) == []
    assert [line[0] for line in instruction_counts.higher({"a": 1060, "b": 1000, "d": 1}, before)] == ["a", "c", "d"]
