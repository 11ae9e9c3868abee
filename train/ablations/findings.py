"""What a study found: distances by row and width, ratios with their intervals, directions, widths by layer type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.ablations.config import Row
from train.ablations.intervals import Interval, ratio_interval
from train.ablations.runs import RowAllocation, RunResult, floor_distance, network_digest
from train.ablations.study import Study

METRIC = "FD-FashionNet"

# Most that a student's distance may be of the teacher's, by width: this project's aims.
AIMS = {4: 1.15, 3: 1.3, 2: 1.6}


@dataclass(frozen=True)
class Cell:
    """One row at one width: ``distances`` by seed; null where a run diverged. ``ratio`` to full precision."""

    row: str
    width: int
    distances: list[float | None]
    agreements: list[float]
    ratio: Interval | None


@dataclass(frozen=True)
class Direction:
    """``ratio``: distance of ``row`` to that of the row ``above`` it, paired by seed."""

    row: str
    above: str
    width: int
    ratio: Interval | None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "diverged"
        if self.ratio.high < 1:
            return "better"
        return "worse" if self.ratio.low > 1 else "not told apart"


def cells(study: Study, rows: Sequence[Row]) -> Iterator[Cell]:
    """One for each row and width whose runs are all there."""
    full = distances(study.results(None, 0))
    for row in rows:
        for width in study.config.row_widths(row):
            results = study.results(row, width)
            if results:
                found = [each.distance for each in results]
                yield Cell(row.name, width, found, [each.agreement for each in results], _ratio(found, full))


def directions(study: Study) -> Iterator[Direction]:
    """Each row of the ladder against the one above it, each extra row against the last of the ladder."""
    config = study.config
    pairs = [*zip(config.ladder[1:], config.ladder, strict=False), *((row, config.ladder[-1]) for row in config.extras)]
    for row, above in pairs:
        for width in config.row_widths(row):
            found, base = distances(study.results(row, width)), distances(study.results(above, width))
            if found and base:
                yield Direction(row.name, above.name, width, _ratio(found, base))


def distances(results: Sequence[RunResult]) -> list[float | None]:
    return [each.distance for each in results]


def _ratio(above: Sequence[float | None], below: Sequence[float | None]) -> Interval | None:
    if not above or not below or None in above or None in below:
        return None
    return ratio_interval([a for a in above if a is not None], [b for b in below if b is not None])


def as_json(study: Study) -> dict[str, Any]:
    """Every figure of the report, and the configuration that made it."""
    _, _, accuracy = study.place.network(network_digest(study.full_precision(0)))
    config = study.config.model_dump(mode="json")
    config["data"] = study.config.data.name
    return {
        "metric": METRIC,
        "feature_network_accuracy": accuracy,
        "real_images": floor_distance(study.place, study.full_precision(0)),
        "full_precision": [asdict(each) for each in study.results(None, 0)],
        "rows": [asdict(each) for each in cells(study, study.config.rows)],
        "directions": [{**asdict(each), "verdict": each.verdict} for each in directions(study)],
        "allocations": [
            {"row": row.name, "width": width, **{m: a.as_dict() for m, a in found.allocations.items()}}
            for row, width, found in searched_widths(study)
        ],
        "data": study.teacher.data,
        "config": config,
    }


def searched_widths(study: Study) -> Iterator[tuple[Row, int, RowAllocation]]:
    for row in study.config.rows:
        for width in study.config.row_widths(row):
            found = study.allocation(row, width)
            if found is not None:
                yield row, width, found
