"""Names to ids: synonyms, blanks, and checkpoints without names."""

from __future__ import annotations

import pytest

from server.api.classes import ClassIndex
from server.api.errors import ApiError

NAMES = ("tench, Tinca tinca", "crane", "crane, derrick", "", "maillot", "maillot, tank suit")


def test_whole_names_win_over_synonyms() -> None:
    index = ClassIndex(NAMES, 6)
    assert index.resolve(None, "tinca_tinca") == 0
    assert index.resolve(None, "crane") == 1
    assert index.resolve(None, "Crane, Derrick") == 2
    assert index.resolve(None, "tank suit") == 5
    assert index.name(3) == index.name(99) == ""


def test_a_checkpoint_without_names_takes_ids_only() -> None:
    index = ClassIndex((), 6)
    assert index.resolve(5, None) == 5
    with pytest.raises(ApiError, match="no class names"):
        index.resolve(None, "tench")


def test_nothing_close_gives_no_hint() -> None:
    with pytest.raises(ApiError) as error:
        ClassIndex(NAMES, 6).resolve(None, "zzzz")
    assert error.value.message == "class_name is not a class of this checkpoint"
