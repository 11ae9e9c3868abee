"""A measured figure, and the check without which there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Scale:
    """How much is run: seconds and counts."""

    quick: bool

    def of(self, full: N, quick: N) -> N:
        return quick if self.quick else full


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Args:
        text: the result in words and numbers.
        target: what it should be; met: whether it is.
        check: what proves that the work behind the figure was really done, and done right.
        details: everything measured, for the file.
    """

    measure: str
    text: str
    target: str
    met: bool
    check: str
    details: dict[str, Any]


class CheckFailed(Exception):
    """The figures cannot be trusted: the work was not done, or done wrong."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)
