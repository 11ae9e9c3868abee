"""A measured figure, the table of them, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from robuq_core.bench.report import machine
from robuq_core.files import replacing

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
        target: what it should be.
        met: whether it is.
        check: what proves that the work behind the figure was really done, and done right. A check that fails raises,
            so there is no figure without it.
        details: everything measured, for the file.
    """

    measure: str
    text: str
    target: str
    met: bool
    check: str
    details: dict[str, Any] = field(default_factory=dict)


class CheckFailed(Exception):
    """The figures cannot be trusted: the work was not done, or done wrong."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def show(figures: Sequence[Figure], console: Console) -> None:
    table = Table("measure", "result", "target", "", "checked by", show_lines=True)
    for figure in figures:
        mark = "[green]met[/]" if figure.met else "[red]missed[/]"
        table.add_row(figure.measure, figure.text, figure.target, mark, figure.check)
    console.print(table)


def write(figures: Sequence[Figure], path: Path, *, quick: bool) -> None:
    report = {"machine": machine(), "quick": quick, "figures": [asdict(figure) for figure in figures]}
    with replacing(path) as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
