"""Names to ids: whole names win over synonyms, spelling does not matter, and what is unclear is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.classes import ClassNames, normalise, synonyms_of

NAMES = ("tench, Tinca tinca", "crane", "crane, derrick", "", "maillot", "maillot, tank suit", "sack, bag", "bag, poke")


def test_names_and_synonyms_of_any_spelling() -> None:
    names = ClassNames(NAMES, len(NAMES))
    assert names.resolve("tinca_tinca") == names.resolve("  TENCH ") == 0
    assert names.resolve("crane") == 1
    assert names.resolve("Crane,  Derrick") == names.resolve("derrick") == 2
    assert names.resolve(5) == 5
    assert names.ids("bag") == [6, 7]
    assert names.ids("") == []


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (NAMES, "shark", r"'shark' is not a class of this checkpoint; .* 0\.\.7"),
        (NAMES, "bag", "'bag' matches several classes; give one of the ids 6, 7"),
        ((), "tench", r"this checkpoint has no class names; give the class id, 0\.\.7"),
        (("", ""), "tench", "no class names"),
    ],
)
def test_what_is_no_one_class_is_told(names: tuple[str, ...], asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNames(names, 8).resolve(asked)


@given(st.lists(st.text(min_size=1), max_size=6))
def test_every_class_is_found_by_its_whole_name(names: list[str]) -> None:
    index = ClassNames(names, len(names))
    for class_id, name in enumerate(names):
        if name.strip():
            assert class_id in index.ids(name)
            assert normalise(normalise(name)) == normalise(name)


def test_synonyms_keep_their_spelling() -> None:
    assert synonyms_of("tench, Tinca tinca,") == ["tench", "Tinca tinca"]
    assert synonyms_of(" ") == []
