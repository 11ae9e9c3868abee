"""A study: one training run, and rows that override some of its keys.

Every row is the run's own quantisation-aware training, from the same teacher, with the same data, loop and loss. Rows
of one seed share batches, noise and the signs of the rotation, so they are compared seed by seed. Each result is a file
named by the digest of all that it depends on: a study that was stopped continues, and a changed key retrains what
depends on it and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robuq_core.checkpoint import layer_macs
from robuq_core.config import QuantConfig
from robuq_core.files import read_json, replacing
from robuq_core.models.dit import DiT, DiTBlock
from robuq_core.models.quant_linear import quantize_model
from train.ablations.config import Row, StudyConfig
from train.allocate import Allocation, allocate
from train.config import StageConfig, TrainConfig, load_config
from train.data import BatchSource
from train.evaluation.frechet import RunningMoments, frechet_distance_of_moments
from train.evaluation.networks import EfficientNetLite0
from train.evaluation.reference import reference
from train.evaluation.samples import balanced_classes, draw, plain_sampler
from train.loss import diffusion_loss
from train.messages import one_line
from train.run import Run
from train.sensitivity import FixedBatch, Sensitivity, fixed_set, measure_sensitivity
from train.stages import at_search_width
from train.state import StateError, locked
from train.trainer import DivergedError, Trainer

Note = Callable[[str], None]

_BATCH = 100
# Keys that change no number: a study may change them and keep its results.
_IDLE = ("save_every", "keep_every", "log_every", "eval_every", "eval_samples")


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
    the teacher's. All null if the training diverged. ``fd``: FD-EffNet of samples, null where none were drawn."""

    teacher_mse: float | None
    loss: float | None
    teacher_loss: float
    fd: float | None
    seconds: float


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


class Teacher:
    """The teacher of a configuration, an ordinary run below the study's folder, and the points of its comparison."""

    def __init__(self, config: TrainConfig, points: int, note: Note) -> None:
        self.config, self._points = config, points
        self.run = Run(config, note).alone("teacher")

    def model(self) -> DiT:
        return self.run.teacher().eval()

    def source(self, config: TrainConfig, batch_size: int) -> BatchSource:
        return BatchSource(self.run.dataset, config.data, config.model.input_size, batch_size, config.seed)

    @cached_property
    def held_out(self) -> list[FixedBatch]:
        dataset, config = self.run.held_out.dataset, _still(self.config)
        source = BatchSource(dataset, config.data, config.model.input_size, min(_BATCH, len(dataset)), 0)
        return fixed_set(source, self._points, 0, torch.device("cpu"), config.diffusion.prediction_type)

    @cached_property
    def predictions(self) -> tuple[list[torch.Tensor], float]:
        return self.predict(self.model())

    @torch.inference_mode()
    def predict(self, model: DiT) -> tuple[list[torch.Tensor], float]:
        """Outputs of ``model`` on the held-out points, by batch, and its mean diffusion loss there."""
        outputs, total = [], 0.0
        device = next(model.parameters()).device
        for each in self.held_out:
            output = model(each.x_t.to(device), each.timesteps.to(device), each.classes.to(device)).float().cpu()
            loss = diffusion_loss(output, each.x0, each.x_t, each.noise, each.timesteps, self.config.diffusion)
            outputs.append(output[:, : each.x0.shape[1]])
            total += float(loss) * len(output)
        return outputs, total / sum(map(len, outputs))


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
        """The run with the row's overrides and seed; its ``run_dir`` is that of the teacher."""
        if cell.row.search:
            width: dict[str, Any] = {"allocate.average_bits": cell.bits, "sensitivity.after": cell.row.search}
        else:
            width = {"quant.activation_bits": int(cell.bits)}
        config = self._load(cell.row, **{"seed": cell.seed, "quant.seed": cell.seed}, **width)
        return config.model_copy(update={"run_dir": self.teacher_config(cell.row).run_dir})

    def teacher_config(self, row: Row) -> TrainConfig:
        """One teacher for all rows that change nothing of it, whatever the seed."""
        config = self._load(row)
        keys = (
            "seed",
            "precision",
            "class_dropout",
            "class_init",
            "class_init_std",
            "model",
            "diffusion",
            "data",
            "teacher",
        )
        made_of = {key: value for key, value in config.model_dump(mode="json").items() if key in keys}
        made_of["teacher"] = _without_idle(config.teacher)
        made_of["data"] = {key: value for key, value in made_of["data"].items() if key not in ("path", "class_names")}
        return config.model_copy(update={"run_dir": self.folder / f"teacher-{_digest(made_of)}"})

    def teacher(self, row: Row, note: Note = lambda _: None) -> Teacher:
        """Trained first, or continued, if it is not there."""
        config = self.teacher_config(row)
        if config.run_dir not in self._teachers:
            self._teachers[config.run_dir] = Teacher(config, self.config.points, note)
        return self._teachers[config.run_dir]

    def sensitivity_path(self, cell: Cell) -> Path:
        config = at_search_width(self.run_config(cell))
        warm = _without_idle(config.warmup) if cell.row.search == "warmup" else None
        measured = config.sensitivity.model_dump(mode="json", exclude={"metric"})
        made_of = {"warmup": warm, "sensitivity": measured, **self._made_of(cell, config, config.quant)}
        return self.folder / "sensitivity" / f"{_digest(made_of)}.json"

    def _made_of(self, cell: Cell, config: TrainConfig, quant: QuantConfig) -> dict[str, Any]:
        return {
            "teacher": config.run_dir.name,
            "quant": None if cell.row.full_precision else quant.model_dump(mode="json"),
            "seed": cell.seed,
            "precision": config.precision,
            "outliers": None if cell.factor == 1 else (cell.factor, self.config.outlier_channels),
        }

    def allocation(self, cell: Cell) -> Allocation | None:
        """The widths that the search gives ``cell``; none without a search, or before it."""
        path = self.sensitivity_path(cell)
        if not cell.row.search or not path.exists():
            return None
        config = self.run_config(cell)
        losses = Sensitivity.load(path).rise[config.sensitivity.metric]
        return allocate(losses, layer_macs(config.model), cell.bits, config.allocate.method)

    def result_path(self, cell: Cell) -> Path | None:
        """None as long as the widths of a searched row are not known."""
        config = self.run_config(cell)
        quant = config.quant
        if cell.row.search:
            found = self.allocation(cell)
            if found is None:
                return None
            quant = _with_bits(quant, found.bits)
        made_of = {
            **self._made_of(cell, config, quant),
            "qat": _without_idle(config.qat),
            "points": self.config.points,
            "split": config.evaluation.split,
        }
        if self.config.fd_samples:
            made_of |= {"fd": self.config.fd_samples, "sampler": config.sampler.model_dump(mode="json")}
        return self.folder / "results" / f"{_digest(made_of)}.json"

    def result(self, cell: Cell) -> Result | None:
        """None if it is not there yet.

        Raises:
            StateError: the file is damaged.
        """
        path = self.result_path(cell)
        if path is None or not path.exists():
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
            if self.result(cell) is not None:
                continue
            with ExitStack() as held:
                teacher = self.teacher(cell.row, note)
                try:
                    if cell.row.search:
                        held.enter_context(locked(self.sensitivity_path(cell)))
                        self._search(cell, teacher)
                    path = self.result_path(cell)
                    assert path is not None
                    held.enter_context(locked(path))
                except StateError as error:
                    note(f"[{i}/{len(cells)}] {cell}: {error}")
                    busy += 1
                    continue
                if not path.exists():
                    found = self._train(cell, teacher, path)
                    note(f"[{i}/{len(cells)}] {cell}: MSE to the teacher {found.teacher_mse} in {found.seconds:.0f} s")
        return busy

    def _student(self, cell: Cell, teacher: Teacher, quant: QuantConfig) -> DiT:
        model = teacher.model()
        if cell.factor != 1:
            add_outliers(model, cell.factor, self.config.outlier_channels, cell.seed)
        return model if cell.row.full_precision else quantize_model(model, quant)

    def _search(self, cell: Cell, teacher: Teacher) -> None:
        path = self.sensitivity_path(cell)
        if path.exists():
            return
        config = at_search_width(self.run_config(cell))
        student = self._student(cell, teacher, config.quant)
        if cell.row.search == "warmup":
            source, state = teacher.source(config, config.warmup.batch_size), self.folder / "states" / path.stem
            trainer = Trainer(config, config.warmup, student, source, state)
            trainer.run()
            with trainer.ema.applied_to(student):
                student = copy.deepcopy(student)
            _remove_state(state)
        settings = config.sensitivity
        source = teacher.source(_still(config), settings.batch_size)
        device = next(student.parameters()).device
        batches = fixed_set(source, settings.samples, config.seed, device, config.diffusion.prediction_type)
        measured = measure_sensitivity(
            student,
            teacher.model().to(device),
            batches,
            config.diffusion,
            bits=settings.bits,
            reference_bits=config.quant.activation_bits,
            guidance_scale=settings.guidance_scale,
        )
        measured.save(path)

    def _train(self, cell: Cell, teacher: Teacher, path: Path) -> Result:
        config, started = self.run_config(cell), time.perf_counter()
        found = self.allocation(cell)
        quant = config.quant if found is None else _with_bits(config.quant, found.bits)
        config = config.model_copy(update={"quant": quant})
        student = self._student(cell, teacher, quant)
        state = self.folder / "states" / path.stem
        targets, teacher_loss = teacher.predictions
        mse = loss = fd = None
        distilled = teacher.model() if config.qat.distill_weight and not cell.row.full_precision else None
        try:
            source = teacher.source(config, config.qat.batch_size)
            trainer = Trainer(config, config.qat, student, source, state, teacher=distilled)
            trainer.run()
        except DivergedError:
            pass
        else:
            with trainer.ema.applied_to(student):
                student.eval()
                outputs, loss = teacher.predict(student)
                errors = [(a - b).double().square().mean(dim=(1, 2, 3)) for a, b in zip(outputs, targets, strict=True)]
                mse = float(torch.cat(errors).mean())
                if self.config.fd_samples:
                    fd = self._distance(config, student, cell.seed)
        result = Result(mse, loss, teacher_loss, fd, time.perf_counter() - started)
        tree = {"cell": str(cell), "config": config.model_dump(mode="json"), "result": asdict(result)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
        _remove_state(state)
        return result

    def _distance(self, config: TrainConfig, student: DiT, seed: int) -> float:
        """FD-EffNet of samples of ``student``; rows of one seed start from the same noise."""
        if self._network is None:
            self._network = EfficientNetLite0()
        photos, moments = reference(config, self._network).pool, RunningMoments()
        sampler = plain_sampler(student, config, "student")
        classes = balanced_classes(self.config.fd_samples, config.model.valid_classes, seed)
        for first in range(0, len(classes), _BATCH):
            batch = classes[first : first + _BATCH]
            moments.add(self._network(draw(sampler, batch, (seed << 16) + first, config.sampler)).pool)
        return frechet_distance_of_moments(moments.result(), photos)


def _remove_state(states: Path) -> None:
    folder = states.parent.parent
    for path in (states, folder / "tensorboard" / states.name):
        shutil.rmtree(path, ignore_errors=True)
    (folder / f"{states.name}.log.jsonl").unlink(missing_ok=True)


def _with_bits(quant: QuantConfig, bits: dict[str, int]) -> QuantConfig:
    """``quant`` with ``bits``; those equal to its own width are omitted, so that equal trainings have one result."""
    own = {name: width for name, width in bits.items() if width != quant.activation_bits}
    return quant.model_copy(update={"bits": own})


def _still(config: TrainConfig) -> TrainConfig:
    """Without augmentation."""
    data = config.data.model_copy(update={"flip_probability": 0.0, "colour_jitter": 0.0})
    return config.model_copy(update={"data": data})


def _without_idle(stage: StageConfig) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude=set(_IDLE))


def _digest(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
