"""Names to ids: synonyms, blanks, checkpoints without names, and the order of a search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.classes import ClassIndex
from server.errors import ApiError

NAMES = ("tench, Tinca tinca", "crane", "crane, derrick", "", "maillot", "maillot, tank suit")
ZOO = (
    "shark",
    "great white shark",
    "sharksucker",
    "tiger shark, Galeocerdo cuvieri",
    "loan shark",
    "goldfish",
    "golden retriever",
    "Labrador retriever",
    "12 angry men",
)


def test_whole_names_win_over_synonyms() -> None:
    index = ClassIndex(NAMES, 6)
    assert index.of_request(None, "tinca_tinca") == 0
    assert index.of_request(None, "crane") == 1
    assert index.of_request(None, "Crane, Derrick") == 2
    assert index.of_request(None, "tank suit") == 5
    assert index.name(3) == index.name(99) == ""


def test_a_checkpoint_without_names_takes_ids_only() -> None:
    index = ClassIndex((), 6)
    assert index.of_request(5, None) == 5
    with pytest.raises(ApiError, match="no class names"):
        index.of_request(None, "tench")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("shark", [0, 2, 4, 3, 1]),  # whole, beginning, then words: the shorter first
        ("SHARK", [0, 2, 4, 3, 1]),
        ("retr", [6, 7]),
        ("white_shark", [1]),
        ("cuvieri", [3]),
        ("hark", [0, 4, 2, 3, 1]),
        ("goldfsh", [5]),
        ("goldn retreiver", [6]),
        ("2", [2, 8]),
        ("8", [8]),
        ("99999999999999999999", []),
        ("zzzz", []),
        ("", list(range(9))),
        ("  ", list(range(9))),
    ],
)
def test_a_search_ranks(query: str, expected: list[int]) -> None:
    assert ClassIndex(ZOO, 9).search(query, 20) == expected
    assert ClassIndex(ZOO, 9).search(query, 2) == expected[:2]


@given(query=st.text(max_size=30), limit=st.integers(1, 12))
def test_a_search_finds_each_class_once_and_no_more_than_asked(query: str, limit: int) -> None:
    found = ClassIndex(ZOO, 9).search(query, limit)
    assert len(found) == len(set(found)) <= limit
    assert all(0 <= class_id < 9 for class_id in found)


@given(class_id=st.sampled_from([0, 1, 2, 4, 5, 6, 7, 8]), drop=st.integers(0, 30))
def test_a_name_with_one_letter_missing_is_found(class_id: int, drop: int) -> None:
    name = ZOO[class_id]
    cut = drop % len(name)
    assert class_id in ClassIndex(ZOO, 9).search(name[:cut] + name[cut + 1 :], 9)
