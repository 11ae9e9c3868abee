"""The YAML file of an ablation study, and the runs that it asks for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig, StrictModel
from robuq_core.files import read_bounded
from train.allocate import Method
from train.config import ConfigError, SensitivityConfig, StageConfig, parse_yaml
from train.messages import one_line

DIGEST_LENGTH = 12


class Row(StrictModel):
    """One way to quantise. ``quant.activation_bits`` is set by the study's widths (or the row's own).

    ``allocate``: give each layer its own width, by this method, at the same average; ``sensitivity_after``: measured on
    a student that was trained for ``warmup`` steps, or on the untrained one (PTQ).
    """

    name: str = Field(min_length=1)
    quant: QuantConfig
    widths: tuple[int, ...] | None = None
    allocate: Method | None = None
    sensitivity_after: Literal["warmup", "teacher"] = "warmup"


class ClassifierConfig(StrictModel):
    """The feature network: trained on the same data, once."""

    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=2e-3, gt=0)

    @property
    def digest(self) -> str:
        return _digest(self)


class StudyConfig(StrictModel):
    """``ladder``: rows that build on one another, top to bottom; ``extras``: rows beside it, each against the last."""

    data: Path
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig(sampler="dpmsolver++", steps=10, guidance_scale=1.0)
    samples: int = Field(default=2000, ge=2, description="drawn of every run, classes in equal parts")
    class_dropout: float = Field(default=0.1, ge=0, lt=1)
    classifier: ClassifierConfig = ClassifierConfig()
    teacher: StageConfig
    warmup: StageConfig
    qat: StageConfig
    sensitivity: SensitivityConfig = SensitivityConfig()
    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (4, 3, 2)
    ladder: tuple[Row, ...] = Field(min_length=1)
    extras: tuple[Row, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("ladder and extras: two rows have the same name")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds: give at least one, each once")
        if self.model.in_channels != 1:
            raise ValueError(f"model.in_channels must be 1, not {self.model.in_channels}: the images are grey")
        return self

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.ladder + self.extras

    def row_widths(self, row: Row) -> tuple[int, ...]:
        return self.widths if row.widths is None else row.widths


class TeacherSpec(StrictModel):
    """All that the teacher's weights depend on; ``data`` is a checksum."""

    data: str
    model: ModelConfig
    diffusion: DiffusionConfig
    class_dropout: float
    stage: StageConfig

    @property
    def digest(self) -> str:
        return _digest(self)


class RunSpec(StrictModel):
    """All that a run's result depends on; its digest names the result's file. ``quant`` null: full precision."""

    teacher: TeacherSpec
    classifier: ClassifierConfig
    sampler: SamplerConfig
    samples: int
    stage: StageConfig
    quant: QuantConfig | None
    seed: int

    @property
    def digest(self) -> str:
        return _digest(self)


class AllocationSpec(StrictModel):
    """All that the widths of one row depend on. ``warmup`` null: sensitivities of the untrained student."""

    teacher: TeacherSpec
    quant: QuantConfig
    warmup: StageConfig | None
    sensitivity: SensitivityConfig

    @property
    def digest(self) -> str:
        return _digest(self)


def _digest(spec: StrictModel) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:DIGEST_LENGTH]


def load_study(path: Path) -> StudyConfig:
    """Read the YAML file of a study.

    Raises:
        ConfigError: unreadable file, unknown key or value out of range.
    """
    try:
        return StudyConfig.model_validate(parse_yaml(read_bounded(path)))
    except ValidationError as error:
        complaints = (f"{'.'.join(map(str, e['loc'])) or 'study'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: " + "; ".join(complaints)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {one_line(error)}") from error
