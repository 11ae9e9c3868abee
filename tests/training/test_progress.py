"""Bars end with their loops, also with those that fail."""

from __future__ import annotations

import threading

import pytest

from train.progress import tracked


def test_every_item_comes() -> None:
    with tracked("abc", "counting") as letters:
        assert list(letters) == ["a", "b", "c"]


def divide(numbers: list[int]) -> None:
    with tracked(numbers, "dividing") as bar:
        for number in bar:
            1 / number


def test_a_loop_that_fails_leaves_no_thread_behind() -> None:
    # The error keeps the frames of its traceback, and with them a generator that nobody has closed.
    with pytest.raises(ZeroDivisionError) as caught:
        divide([1, 0])
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_TrackThread"]
    assert caught.traceback
