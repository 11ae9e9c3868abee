"""Training and sampling of one small model in memory: what every run of a study does.

Losses, schedules and averages are those of :mod:`train.trainer`, steps of sampling those of
:class:`robuq_core.pipeline.Sampler`; only logs, processes and devices are left out.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.config import DiffusionConfig, QuantConfig, SamplerConfig, image_seed
from robuq_core.errors import UserError
from robuq_core.models.dit import DiT
from robuq_core.pipeline import RowSpec, Sampler
from train.ablations.dataset import GreyImages, to_unit
from train.config import StageConfig
from train.data import step_generator
from train.loss import draw_timesteps
from train.state import EMA
from train.state_file import read_state_file, save_state
from train.trainer import NoisyBatch, batch_loss, learning_rate

_SAMPLE_BATCH = 250


class DivergedError(UserError):
    """The loss of a run is no longer finite."""


def train_model(
    model: DiT,
    data: GreyImages,
    stage: StageConfig,
    diffusion: DiffusionConfig,
    *,
    class_dropout: float,
    seed: int,
    state_path: Path | None = None,
    teacher: DiT | None = None,
) -> float:
    """Train ``model`` in place for ``stage.steps`` and leave it with its averaged weights; returns the mean loss of the
    last tenth of the steps.

    ``state_path``: saved there every ``stage.save_every`` steps, and taken up again if it is there. ``teacher``: adds
    ``stage.distill_weight`` times the MSE to its output.

    Raises:
        DivergedError: the loss or the gradient is not finite.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
    )
    average, losses = EMA(model, stage.ema_decay), []
    teach = teacher if stage.distill_weight else None
    first = 0 if state_path is None else _resume(state_path, model, optimiser, average)
    for step in range(first, stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        batch = _noisy_batch(
            data, stage.batch_size, class_dropout, model.config.null_row, step_generator(seed, step), diffusion
        )
        loss = batch_loss(model, batch, diffusion, nullcontext(), teach, stage.distill_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = math.inf if stage.grad_clip is None else stage.grad_clip
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise DivergedError(f"loss {loss.item()}, gradient norm {norm.item()} at step {step}")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(model, step)
        losses.append(loss.item())
        if state_path is not None and (step + 1) % stage.save_every == 0:
            _save(state_path, model, optimiser, average, step + 1)
    model.load_state_dict(average.shadow, strict=False)
    model.eval()
    last = losses[-max(1, stage.steps // 10) :]
    return sum(last) / len(last) if last else math.nan


def _noisy_batch(
    data: GreyImages,
    size: int,
    class_dropout: float,
    null_row: int,
    generator: torch.Generator,
    diffusion: DiffusionConfig,
) -> NoisyBatch:
    index = torch.randint(len(data.train), (size,), generator=generator)
    x0 = to_unit(data.train[index])
    noise = torch.randn(x0.shape, generator=generator)
    timesteps = draw_timesteps(size, generator, diffusion.prediction_type)
    dropped = torch.rand(size, generator=generator) < class_dropout
    return NoisyBatch(x0, noise, timesteps, torch.where(dropped, null_row, data.train_labels[index]))


def _save(path: Path, model: DiT, optimiser: torch.optim.Optimizer, average: EMA, step: int) -> None:
    # No history: the digest in the file's name is of all the settings.
    save_state(path, step=step, model=model.state_dict(), ema=average.shadow, optimiser=optimiser.state_dict(),
               history=[])  # fmt: skip


def _resume(path: Path, model: DiT, optimiser: torch.optim.Optimizer, average: EMA) -> int:
    if not path.exists():
        return 0
    state = read_state_file(path)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    average.shadow = dict(state["ema"])
    return int(state["step"])


def draw_samples(
    model: DiT, count: int, seed: int, sampler: SamplerConfig, diffusion: DiffusionConfig
) -> tuple[Tensor, Tensor]:
    """``count`` samples in [-1, 1], float32 ``[count, C, S, S]``, and their classes (in turn), ``[count]``.

    No guidance. The noise depends on ``seed`` and ``count`` alone, so runs of one seed and count draw with the same.
    """
    header = Header(
        format_version=FORMAT_VERSION,
        model=model.config,
        quant=QuantConfig(),
        diffusion=diffusion,
        sampler=sampler,
        tensors={},
    )
    drawing = Sampler(model, header, checkpoint_name="run", backend_name="torch", weight_bytes=0)
    config = model.config
    classes = torch.arange(count) % config.num_classes
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, config.in_channels, config.input_size, config.input_size, generator=generator)
    rows = [
        drawing.start(RowSpec(class_id, image_seed(count * seed, i), sampler.steps, 1.0, sampler.sampler), noise[i])
        for i, class_id in enumerate(classes.tolist())
    ]
    for first in range(0, count, _SAMPLE_BATCH):
        drawing.finish(rows[first : first + _SAMPLE_BATCH])
    return torch.stack([row.x for row in rows]).clamp(-1, 1), classes
