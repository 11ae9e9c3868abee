"""What a benchmark found, as plain data: the JSON file, read back by the plots. Times in seconds, sizes in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from robuq_core.config import StrictModel
from robuq_core.errors import UserError
from robuq_core.files import replacing

REPORT_VERSION = 1

Level = Literal["op", "block", "forward", "image", "memory", "loading"]
LEVELS: tuple[Level, ...] = get_args(Level)


class SideTiming(StrictModel):
    """One implementation on one case.

    ``relative_error``: of its result, at most ``tolerance``, against the reference backend (ours) or FP32 (peers).
    ``part``: it does part of the case's work. ``speedup``: median over the rounds of FP32's time over this one's of
    the same round; none for parts, and where FP32 did not run.
    """

    name: str
    median_s: float
    p25_s: float
    p75_s: float
    min_s: float
    rounds: int
    relative_error: float
    tolerance: float
    part: bool = False
    speedup: float | None = None


class Absent(StrictModel):
    """A side that was not timed, and why."""

    name: str
    reason: str


class CaseTiming(StrictModel):
    """The sides of one case. ``macs``: multiply-accumulates of the full-precision network, for work per second."""

    level: str
    case: str
    batch: int
    macs: int
    sides: tuple[SideTiming, ...]
    absent: tuple[Absent, ...] = ()


class MemoryUse(StrictModel):
    """Peak memory of a fresh process that samples, over what it held before it loaded anything."""

    model: str
    side: str
    batch: int
    idle_bytes: int
    over_idle_bytes: int


class Loading(StrictModel):
    """A fresh process from its start; medians. ``ready_s``: imports and loading, up to where the first step may begin.
    ``first_image_s``: up to the first picture, where the checkpoint draws pixels."""

    model: str
    file_bytes: int
    import_s: float
    load_s: float
    ready_s: float
    first_step_s: float
    first_image_s: float | None = None


class Report(StrictModel, extra="ignore"):
    """Fields of older reports that are gone are ignored."""

    report_version: int = REPORT_VERSION
    created: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: tuple[CaseTiming, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    loading: tuple[Loading, ...] = ()


def write_report(path: Path, report: Report) -> None:
    """``report`` as JSON in ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Inverse of :func:`write_report`.

    Raises:
        UserError: no such file, or not a report of this version.
    """
    try:
        return Report.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `robuq bench --out {path}`") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: not a benchmark report: {where}: {first['msg']}; run `robuq bench` again") from error
