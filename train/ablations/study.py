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
from typing import Any

import torch
from torch import nn

from robuq_core.config import QuantConfig
from robuq_core.files import read_json, replacing
from robuq_core.models.dit import DiT, DiTBlock
from train.ablations.config import Row, StudyConfig
from train.config import StageConfig, TrainConfig, load_config
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
# Keys that change no number: a study may change them and keep its results.
_IDLE = ("save_every", "keep_every", "log_every", "eval_every", "eval_samples")
_OF_THE_TEACHER = ("seed", "precision", "class_dropout", "class_init", "class_init_std", "model", "diffusion", "data",
                   "teacher")  # fmt: skip


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
        model = self._base.teacher(state)
        factor = self.cell.factor
        return model if factor == 1 else add_outliers(model, factor, self._channels, self.cell.seed)

    def quantized(self, model: DiT, quant: QuantConfig) -> DiT:
        return model if self.cell.row.full_precision else super().quantized(model, quant)


class Study:
    """The cells of ``config``, and their results below ``folder``."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._teachers: dict[Path, Teacher] = {}
        self._network: EfficientNetLite0 | None = None
        for cell in self.cells():
            self.run_config(cell)  # a mistake in any row is reported before the first one trains

    def cells(self) -> Iterator[Cell]:
        """All trainings: those of the contrasts first, seed by seed, so that a study cut short has what it is for."""
        contrasts = {(name, each.bits) for each in self.config.contrasts for name in (each.row, each.against)}
        found = [
            Cell(row, bits, factor, seed)
            for seed in self.config.seeds
            for row in self.config.rows
            for bits, factor in row.trainings
            if row.seeds is None or seed in row.seeds
        ]
        yield from sorted(found, key=lambda cell: cell.factor != 1 or (cell.row.name, cell.bits) not in contrasts)

    def _load(self, row: Row, **more: Any) -> TrainConfig:
        keys = {**self.config.set, **row.set, **more}
        return load_config(self.config.run, [f"{key}={json.dumps(value)}" for key, value in keys.items()])

    def run_config(self, cell: Cell) -> TrainConfig:
        """The run with the row's overrides and seed, in a folder named by the digest of all that its result depends
        on."""
        row, own = cell.row, {"seed": cell.seed, "quant.seed": cell.seed}
        if row.search:
            width: dict[str, Any] = {"allocate.average_bits": cell.bits, "sensitivity.after": row.search}
        else:
            width = {"quant.activation_bits": int(cell.bits)}
        if row.full_precision:
            width["qat.distill_weight"] = 0
        config = self._load(row, **own, **width)
        tree = config.model_dump(mode="json")
        made_of = {
            "teacher": self.teacher_config(row).run_dir.name,
            "seed": cell.seed,
            "precision": config.precision,
            "quant": None if row.full_precision else tree["quant"],
            "qat": _without_idle(config.qat),
            "outliers": None if cell.factor == 1 else (cell.factor, self.config.outlier_channels),
            "search": row.search and (_without_idle(config.warmup), tree["sensitivity"], tree["allocate"]),
            "points": (self.config.points, config.evaluation.split),
            "fd": self.config.fd_samples and (self.config.fd_samples, tree["sampler"]),
        }
        return config.model_copy(update={"run_dir": self.folder / "runs" / _digest(made_of)})

    def teacher_config(self, row: Row) -> TrainConfig:
        """One teacher for all rows that change nothing of it, whatever the seed."""
        config = self._load(row)
        made_of = config.model_dump(mode="json", include=set(_OF_THE_TEACHER))
        made_of["teacher"] = _without_idle(config.teacher)
        made_of["data"] = {key: value for key, value in made_of["data"].items() if key not in ("path", "class_names")}
        return config.model_copy(update={"run_dir": self.folder / f"teacher-{_digest(made_of)}"})

    def teacher(self, row: Row, note: Note = lambda _: None) -> Teacher:
        """Trained first, or continued, if it is not there."""
        config = self.teacher_config(row)
        if config.run_dir not in self._teachers:
            self._teachers[config.run_dir] = Teacher(config, self.config.points, note)
        return self._teachers[config.run_dir]

    def result_path(self, cell: Cell) -> Path:
        return self.folder / "results" / f"{self.run_config(cell).run_dir.name}.json"

    def result(self, cell: Cell) -> Result | None:
        """None if it is not there yet.

        Raises:
            StateError: the file is damaged.
        """
        path = self.result_path(cell)
        if not path.exists():
            return None
        try:
            return Result(**read_json(path)["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{path}: not a result of a study ({one_line(error)}); delete it to train the row again"
            ) from error

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
            if self.config.fd_samples:
                fd = self._distance(run, student)
        bits = dict(run.quant.bits) if cell.row.search else None
        result = Result(mse, loss, teacher_loss, fd, time.perf_counter() - started, bits)
        tree = {"cell": str(cell), "config": run.resolved.model_dump(mode="json"), "result": asdict(result)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
        shutil.rmtree(run.folder)
        return result

    def _distance(self, run: CellRun, student: DiT) -> float:
        """FD-EffNet of samples of ``student``; rows of one seed start from the same noise."""
        if self._network is None:
            self._network = EfficientNetLite0()
        photos = reference(self.teacher(run.cell.row).held_out, self._network).pool
        sampler = plain_sampler(student, run.config, "student")
        seed, count = run.cell.seed, self.config.fd_samples
        return small_distance(sampler, run.config.sampler, count, seed, self._network, photos)


def _without_idle(stage: StageConfig) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude=set(_IDLE))


def _digest(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
