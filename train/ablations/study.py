"""A study: one training run, and rows that override some of its keys.

Every row is a run of its own (:class:`train.run.Run`) on the data and teacher of another. Rows of one seed share
batches, noise and the signs of the rotation, so they are compared seed by seed. Each result is a file named by the
digest of all that it depends on: a study that was stopped continues, and a changed key retrains what depends on it and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from robuq_core.config import QuantConfig, StrictModel
from robuq_core.files import read_bounded, read_json, replacing
from robuq_core.models.dit import DiT, DiTBlock
from train.config import ConfigError, TrainConfig, load_config, parse_yaml
from train.evaluation.networks import EfficientNetLite0
from train.evaluation.reference import reference
from train.evaluation.samples import plain_sampler, small_distance
from train.logs import one_line
from train.loss import diffusion_loss
from train.parallel import training_device
from train.run import Run
from train.sensitivity import FixedBatch
from train.state import StateError, locked
from train.trainer import DivergedError

Note = Callable[[str], None]

_BATCH = 100
# Keys that change no number of a row, or that only say where files lie.
_LOGGING = {"save_every", "keep_every", "log_every", "eval_every", "eval_samples"}
_IDLE: dict[str, Any] = {"run_dir": True, "wandb": True, "compile": True, "data": {"path", "class_names"},
                         **dict.fromkeys(("teacher", "warmup", "qat"), _LOGGING)}  # fmt: skip
_OF_THE_TEACHER = {"seed", "precision", "class_dropout", "class_init", "class_init_std", "model", "diffusion", "data",
                   "teacher"}  # fmt: skip


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

    Raises ConfigError for an unreadable file, an unknown key or a value out of range.
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


@dataclass(frozen=True)
class Cell:
    """One training: a row at one number of bits, outlier factor and seed."""

    row: Row
    bits: float
    factor: float
    seed: int

    def __str__(self) -> str:
        outliers = "" if self.factor == 1 else f", outliers x{self.factor:g}"
        return f"{self.row.name}, A{self.bits:g}{outliers}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """``teacher_mse``: of the prediction on the held-out points; ``loss``: the diffusion loss there, ``teacher_loss``
    the teacher's. All null if the training diverged. ``fd``: FD-EffNet of samples, null where there are none.
    ``bits``: the widths that a search found."""

    teacher_mse: float | None
    loss: float | None
    teacher_loss: float
    fd: float | None
    seconds: float
    bits: dict[str, int] | None = None


@torch.no_grad()
def add_outliers(model: DiT, factor: float, channels: int, seed: int) -> DiT:
    """Make ``channels`` input channels of each qkv, proj and fc1 ``factor`` times as large; returns ``model``.

    The columns of their weights become as much smaller, so in full precision the function stays the same. Inputs of
    qkv and fc1 grow by the rows of adaLN that modulate them, those of proj by the rows of V.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        assert isinstance(block, DiTBlock)
        adaln, qkv = block.adaLN_modulation.get_submodule("1"), block.attn.qkv
        assert isinstance(adaln, nn.Linear)
        width = qkv.in_features
        for consumer, shift in ((qkv, 0), (block.mlp.fc1, 3)):
            chosen = torch.randperm(width, generator=generator)[:channels]
            consumer.weight[:, chosen] /= factor
            for row in (shift * width + chosen, (shift + 1) * width + chosen):
                adaln.weight[row] *= factor
                adaln.bias[row] *= factor
            adaln.bias[(shift + 1) * width + chosen] += factor - 1  # the channel is multiplied by 1 + scale
        chosen = torch.randperm(width, generator=generator)[:channels]
        block.attn.proj.weight[:, chosen] /= factor
        qkv.weight[2 * width + chosen] *= factor
        qkv.bias[2 * width + chosen] *= factor
    return model


class Teacher(Run):
    """The run whose data and teacher rows share, and what that teacher predicts on ``points`` held-out points."""

    def __init__(self, config: TrainConfig, points: int, note: Note) -> None:
        super().__init__(config, note)
        self._points = points
        self.alone("teacher")

    @cached_property
    def points(self) -> list[FixedBatch]:
        return self.held_out.fixed_points(self._points, min(_BATCH, len(self.held_out.dataset)), 0)

    @cached_property
    def predictions(self) -> tuple[list[torch.Tensor], float]:
        return self.predict(self.teacher())

    @torch.inference_mode()
    def predict(self, model: DiT) -> tuple[list[torch.Tensor], float]:
        """Outputs of ``model`` on the points, by batch, and its mean diffusion loss there."""
        outputs, total, device = [], 0.0, training_device()
        model.eval().to(device)
        for each in self.points:
            output = model(each.x_t.to(device), each.timesteps.to(device), each.classes.to(device)).float().cpu()
            loss = diffusion_loss(output, each.x0, each.x_t, each.noise, each.timesteps, self.config.diffusion)
            outputs.append(output[:, : each.x0.shape[1]])
            total += float(loss) * len(output)
        return outputs, total / sum(map(len, outputs))


class CellRun(Run):
    """The run of ``cell``, with the data and teacher of ``base``; ``channels``: how many are outliers."""

    def __init__(self, config: TrainConfig, cell: Cell, base: Teacher, channels: int) -> None:
        super().__init__(config, lambda _: None, base)
        self.cell, self._base, self._channels = cell, base, channels

    def teacher(self, state: Path | None = None) -> DiT:
        model, factor = self._base.teacher(state), self.cell.factor
        return model if factor == 1 else add_outliers(model, factor, self._channels, self.cell.seed)

    def quantized(self, model: DiT, quant: QuantConfig) -> DiT:
        return model if self.cell.row.full_precision else super().quantized(model, quant)


class Study:
    """The cells of ``config``, and their results below ``folder``."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._teachers: dict[Path, Teacher] = {}
        for cell in self.cells():
            self.run_config(cell)  # a mistake in any row is reported before the first one trains

    @cached_property
    def _network(self) -> EfficientNetLite0:
        return EfficientNetLite0()

    def cells(self) -> Iterator[Cell]:
        """All trainings: those of the contrasts first, seed by seed, so that a study cut short has what it is for."""
        contrasts = {(name, each.bits) for each in self.config.contrasts for name in (each.row, each.against)}
        found = [
            Cell(row, bits, factor, seed)
            for seed in self.config.seeds
            for row in self.config.rows
            for bits, factor in dict.fromkeys(
                [(bits, 1.0) for bits in row.bits] + [(row.bits[0], factor) for factor in row.outliers]
            )
            if row.seeds is None or seed in row.seeds
        ]
        yield from sorted(found, key=lambda cell: cell.factor != 1 or (cell.row.name, cell.bits) not in contrasts)

    def _load(self, row: Row, **more: Any) -> TrainConfig:
        keys = {**self.config.set, **row.set, **more}
        return load_config(self.config.run, [f"{key}={json.dumps(value)}" for key, value in keys.items()])

    def run_config(self, cell: Cell) -> TrainConfig:
        """The run with the row's overrides and seed, in a folder named by the digest of all that its result depends
        on."""
        row = cell.row
        own: dict[str, Any] = {"seed": cell.seed, "quant.seed": cell.seed}
        if row.search:
            own |= {"allocate.average_bits": cell.bits, "sensitivity.after": row.search}
        else:
            own |= {"quant.activation_bits": int(cell.bits)}
        if row.full_precision:
            own |= {"qat.distill_weight": 0}
        config = self._load(row, **own)
        unused = () if row.search else ("warmup", "sensitivity", "allocate")
        made_of = config.model_dump(mode="json", exclude={**_IDLE, **dict.fromkeys(unused, True)})
        outliers = cell.factor != 1 and (cell.factor, self.config.outlier_channels)
        digest = _digest(made_of, outliers, self.config.points, self.config.fd_samples)
        return config.model_copy(update={"run_dir": self.folder / "runs" / digest})

    def teacher(self, row: Row, note: Note = lambda _: None) -> Teacher:
        """One for all rows that change nothing of it, whatever their seed; trained first, if it is not there."""
        config = self._load(row)
        digest = _digest(config.model_dump(mode="json", include=_OF_THE_TEACHER, exclude=_IDLE))
        folder = self.folder / f"teacher-{digest}"
        if folder not in self._teachers:
            config = config.model_copy(update={"run_dir": folder})
            self._teachers[folder] = Teacher(config, self.config.points, note)
        return self._teachers[folder]

    def result_path(self, cell: Cell) -> Path:
        return self.folder / "results" / f"{self.run_config(cell).run_dir.name}.json"

    def result(self, cell: Cell) -> Result | None:
        """None if it is not there yet. Raises StateError if the file is damaged."""
        path = self.result_path(cell)
        if not path.exists():
            return None
        try:
            return Result(**read_json(path)["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path}: not a result of a study ({one_line(error)}); delete it to train the row again"
                             ) from error  # fmt: skip

    def run(self, note: Note = print) -> int:
        """Train and measure every cell that has no result; returns how many other processes are busy with."""
        cells, busy = list(self.cells()), 0
        for i, cell in enumerate(cells, 1):
            path = self.result_path(cell)
            if self.result(cell) is not None:
                continue
            teacher = self.teacher(cell.row, note)
            try:
                with locked(path):
                    if not path.exists():
                        found = self._train(cell, teacher, path)
                        note(f"[{i}/{len(cells)}] {cell}: MSE to the teacher {found.teacher_mse} in "
                             f"{found.seconds:.0f} s")  # fmt: skip
            except StateError as error:
                note(f"[{i}/{len(cells)}] {cell}: {error}")
                busy += 1
        return busy

    def _train(self, cell: Cell, teacher: Teacher, path: Path) -> Result:
        started = time.perf_counter()
        run = CellRun(self.run_config(cell), cell, teacher, self.config.outlier_channels)
        targets, teacher_loss = teacher.predictions
        mse = loss = fd = None
        try:
            run.until("qat")
        except DivergedError:
            pass
        else:
            student = run.student()
            outputs, loss = teacher.predict(student)
            errors = [(a - b).double().square().mean(dim=(1, 2, 3)) for a, b in zip(outputs, targets, strict=True)]
            mse = float(torch.cat(errors).mean())
            if self.config.fd_samples:  # rows of one seed start from the same noise
                photos, settings = reference(teacher.held_out, self._network).pool, run.config.sampler
                sampler = plain_sampler(student, run.config, "student")
                fd = small_distance(sampler, settings, self.config.fd_samples, cell.seed, self._network, photos)
        bits = dict(run.quant.bits) if cell.row.search else None
        result = Result(mse, loss, teacher_loss, fd, time.perf_counter() - started, bits)
        tree = {"cell": str(cell), "config": run.resolved.model_dump(mode="json"), "result": asdict(result)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
        shutil.rmtree(run.folder)
        return result


def _digest(*made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
