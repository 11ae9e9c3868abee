"""The YAML file of a study: rows of overrides, and the contrasts that are named before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from robuq_core.config import StrictModel
from robuq_core.files import read_bounded
from train.config import ConfigError, parse_yaml
from train.logs import one_line


class Row(StrictModel):
    """One way to quantise: overrides ``set`` of the run, at each of ``bits``.

    ``search``: each layer has its own width at that average, by sensitivities measured after the warm-up or on the
    untrained student (``teacher``). ``outliers``: factors of :func:`add_outliers`, at the first of ``bits``.
    ``full_precision``: not quantised, the teacher trained for as many more steps.
    """

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    bits: tuple[float, ...] = (2,)
    outliers: tuple[float, ...] = (1,)
    seeds: tuple[int, ...] | None = None
    search: Literal["warmup", "teacher"] | None = None
    full_precision: bool = False

    @property
    def trainings(self) -> list[tuple[float, float]]:
        """Bits and outlier factor of each."""
        found = [(bits, 1.0) for bits in self.bits] + [(self.bits[0], factor) for factor in self.outliers]
        return list(dict.fromkeys(found))

    @model_validator(mode="after")
    def _whole_bits(self) -> Row:
        if not self.search and any(bits != int(bits) for bits in self.bits):
            raise ValueError("bits must be whole numbers in a row without search")
        return self


class Contrast(StrictModel):
    """A comparison named before the study runs: row ``row`` against row ``against``, at the same ``bits``."""

    name: str
    row: str
    against: str
    bits: float = 2


class StudyConfig(StrictModel):
    """``run``: YAML file of the training run, relative to the study's file; ``set``: overrides of it for all rows."""

    run: Path
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    points: int = Field(default=2000, ge=1, description="held-out (image, noise, t) that every student is measured on")
    fd_samples: int = Field(default=0, ge=0, description="samples of which FD-EffNet is measured; 0: none")
    outlier_channels: int = Field(default=2, ge=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    contrasts: tuple[Contrast, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        rows = {row.name: row for row in self.rows}
        if len(rows) < len(self.rows):
            raise ValueError("rows: two have the same name")
        for each in self.contrasts:
            for name in (each.row, each.against):
                if name not in rows or each.bits not in rows[name].bits:
                    raise ValueError(f"contrasts: {each.name!r} needs a row {name!r} at {each.bits:g} bits")
        return self


def load_study(path: Path, overrides: list[str] | None = None) -> StudyConfig:
    """Read the YAML file of a study; ``overrides``: ``section.key=value`` of its run, or ``points=500`` of the study.

    Raises:
        ConfigError: unreadable file, unknown key or value out of range.
    """
    pairs = {key: value for key, _, value in (override.partition("=") for override in overrides or [])}
    try:
        changes = {key: parse_yaml(value) for key, value in pairs.items()}
        own = {key: changes.pop(key) for key in list(changes) if key in StudyConfig.model_fields}
        study = StudyConfig.model_validate({**parse_yaml(read_bounded(path)), **own})
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc'])) or 'study'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: " + "; ".join(found)) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {one_line(error)}") from error
    return study.model_copy(update={"run": path.parent / study.run, "set": {**study.set, **changes}})
