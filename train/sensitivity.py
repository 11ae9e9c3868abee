"""What each layer loses at each activation width, all others at one reference width: the table that allocation reads.

Measured on a fixed set of (x_t, t, noise, class): the rise of the prediction's mean squared error against the teacher,
and of the plain diffusion loss. The paper measures after about 1,000 steps of training, not on the untrained model.

Every value is kept by batch too, so that what an allocation owes to these points can be resampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from robuq_core.config import NUM_TRAIN_TIMESTEPS, DiffusionConfig, PredictionType, StrictModel
from robuq_core.diffusion.update import guide, guided_channels
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, is_adaln, quantizable_linears
from train.data import BatchSource, step_generator
from train.logs import tracked
from train.loss import add_noise, diffusion_loss

Metric = Literal["teacher_mse", "diffusion_loss"]
METRICS: tuple[Metric, ...] = ("teacher_mse", "diffusion_loss")

_STREAM = 5  # of the fixed set's random numbers, apart from those of training


class SensitivityError(UserError):
    """A sensitivity table that cannot be read or measured."""


class Sensitivity(StrictModel):
    """``rise[metric][layer][bits]``: the metric with that layer at that width minus ``base[metric]``, where every
    searched layer is at ``reference_bits``. ``samples``: size of the fixed set. ``by_batch``: ``rise`` of each batch of
    it, of ``batch_sizes`` points. ``guidance_scale``: with which both models predicted for ``teacher_mse``."""

    reference_bits: int
    samples: int
    guidance_scale: float
    base: dict[Metric, float]
    rise: dict[Metric, dict[str, dict[int, float]]]
    batch_sizes: tuple[int, ...]
    by_batch: dict[Metric, dict[str, dict[int, list[float]]]]

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Raises SensitivityError if the file is missing or not a sensitivity table."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise SensitivityError(f"{path} does not exist: run the sensitivity stage first") from error
        except (OSError, ValidationError) as error:
            raise SensitivityError(f"{path}: not a sensitivity table; delete it and measure again") from error


@dataclass(frozen=True)
class FixedBatch:
    """``x0``, ``noise`` and their mixture ``x_t``, float32 ``[B, C, H, W]``; ``timesteps`` and ``classes`` ``[B]``."""

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    timesteps: Tensor
    classes: Tensor


def fixed_batch(x0: Tensor, classes: Tensor, seed: int, index: int, prediction_type: PredictionType) -> FixedBatch:
    """Points for images ``x0`` of ``classes``: timesteps and noise depend on ``(seed, index)`` alone.

    Timesteps are spread evenly over the process, from a random start, so that few points cover it.
    """
    generator = step_generator(seed, index, stream=_STREAM)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    fractions = (torch.arange(len(x0), dtype=torch.float64) + start) / len(x0)
    timesteps = (fractions * NUM_TRAIN_TIMESTEPS).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1).to(x0.device)
    return FixedBatch(x0, noise, add_noise(x0, noise, timesteps, prediction_type), timesteps, classes)


def fixed_set(
    source: BatchSource, samples: int, seed: int, device: torch.device | str, prediction_type: PredictionType
) -> list[FixedBatch]:
    """The first ``samples`` images of ``source`` (its batches 0, 1, ...) as fixed points, the same in every call."""
    batches: list[FixedBatch] = []
    for index in range(-(-samples // source.batch_size)):
        x0, classes = (each[: samples - index * source.batch_size].to(device) for each in source.batch(index))
        batches.append(fixed_batch(x0, classes, seed, index, prediction_type))
    return batches


def searched_layers(model: DiT) -> dict[str, QuantLinear]:
    """The layers whose widths are searched: qkv, proj, fc1 and fc2 of every block; adaLN and attention keep theirs.

    Raises SensitivityError if the model is not quantised.
    """
    layers = {name: each for name, each in quantizable_linears(model) if not is_adaln(name)}
    found = {name: each for name, each in layers.items() if isinstance(each, QuantLinear)}
    if found.keys() != layers.keys():
        raise SensitivityError(f"{next(iter(layers))} is not quantised: sensitivity is that of a quantised model")
    return found


def measure_sensitivity(
    student: DiT,
    teacher: DiT,
    batches: Sequence[FixedBatch],
    diffusion: DiffusionConfig,
    *,
    bits: Sequence[int],
    reference_bits: int,
    guidance_scale: float = 1.0,
) -> Sensitivity:
    """Measure every searched layer of ``student`` at every width of ``bits`` on ``batches``.

    ``guidance_scale``: not 1 compares guided predictions, in which errors of ``cond - uncond`` are multiplied; it
    doubles the work. The diffusion loss stays that of the conditional prediction.

    Leaves all searched layers at ``reference_bits``. Raises SensitivityError if there is no batch, the student is not
    quantised, or a metric is not finite.
    """
    if not batches:
        raise SensitivityError("sensitivity.samples: no sample to measure on")
    layers = searched_layers(student)
    by_batch: dict[Metric, dict[str, dict[int, list[float]]]] = {metric: {} for metric in METRICS}
    with torch.inference_mode():
        targets = [_prediction(teacher.eval(), batch, guidance_scale)[1] for batch in batches]
        for layer in layers.values():
            layer.bits = reference_bits
        base = _metrics(student.eval(), batches, targets, diffusion, guidance_scale)
        with tracked(layers.items(), "sensitivity") as named:
            for name, layer in named:
                for layer.bits in bits:
                    same = layer.bits == reference_bits
                    found = base if same else _metrics(student, batches, targets, diffusion, guidance_scale)
                    for metric in METRICS:
                        rises = [a - b for a, b in zip(found[metric], base[metric], strict=True)]
                        by_batch[metric].setdefault(name, {})[layer.bits] = rises
                layer.bits = reference_bits
    sizes = tuple(len(batch.x0) for batch in batches)

    def mean(values: Sequence[float]) -> float:
        return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)

    return Sensitivity(
        reference_bits=reference_bits,
        samples=sum(sizes),
        guidance_scale=guidance_scale,
        base={metric: mean(values) for metric, values in base.items()},
        rise={
            metric: {name: {width: mean(values) for width, values in row.items()} for name, row in table.items()}
            for metric, table in by_batch.items()
        },
        batch_sizes=sizes,
        by_batch=by_batch,
    )


def _prediction(model: DiT, batch: FixedBatch, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and its first ``C`` channels under guidance of ``scale``."""
    output = model(batch.x_t, batch.timesteps, batch.classes)
    channels = batch.x0.shape[1]
    if scale == 1:
        return output, output[:, :channels]
    config = model.config
    unconditional = model(batch.x_t, batch.timesteps, torch.full_like(batch.classes, config.null_row))
    scales = torch.full((len(output),), scale, device=output.device)
    return output, guide(output, unconditional, scales, guided_channels(channels, config.flavour))[:, :channels]


def _metrics(
    student: DiT,
    batches: Sequence[FixedBatch],
    targets: Sequence[Tensor],
    diffusion: DiffusionConfig,
    guidance_scale: float,
) -> dict[Metric, list[float]]:
    """Each metric by batch."""
    values: dict[Metric, list[float]] = {metric: [] for metric in METRICS}
    for batch, target in zip(batches, targets, strict=True):
        output, prediction = _prediction(student, batch, guidance_scale)
        loss = diffusion_loss(output, batch.x0, batch.x_t, batch.noise, batch.timesteps, diffusion)
        values["teacher_mse"].append(float((prediction - target).square().mean()))
        values["diffusion_loss"].append(float(loss))
    if not all(map(math.isfinite, (*values["teacher_mse"], *values["diffusion_loss"]))):
        raise SensitivityError("sensitivity: the model's output is not finite; train the stage before it again")
    return values
