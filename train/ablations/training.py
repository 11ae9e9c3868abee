"""Training and sampling of one small model in memory: what every run of a study does.

The losses, schedules and averages are those of ``train.trainer``; only files, logs and devices are left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.config import DiffusionConfig, SamplerConfig
from robuq_core.diffusion.samplers import Coefficients, step_coefficients, step_table
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from train.ablations.dataset import GreyImages, to_unit
from train.config import StageConfig
from train.data import step_generator
from train.loss import add_noise, diffusion_loss, draw_timesteps
from train.state import EMA
from train.trainer import learning_rate

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
    first = 0 if state_path is None else _resume(state_path, model, optimiser, average)
    for step in range(first, stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        loss = _loss(model, data, stage, diffusion, class_dropout, seed, step, teacher)
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


def _loss(
    model: DiT,
    data: GreyImages,
    stage: StageConfig,
    diffusion: DiffusionConfig,
    class_dropout: float,
    seed: int,
    step: int,
    teacher: DiT | None,
) -> Tensor:
    generator = step_generator(seed, step)
    index = torch.randint(len(data.train), (stage.batch_size,), generator=generator)
    x0 = to_unit(data.train[index])
    noise = torch.randn(x0.shape, generator=generator)
    timesteps = draw_timesteps(stage.batch_size, generator)
    dropped = torch.rand(stage.batch_size, generator=generator) < class_dropout
    classes = torch.where(dropped, model.config.null_class, data.train_labels[index])
    x_t = add_noise(x0, noise, timesteps)
    output = model(x_t, timesteps, classes)
    loss = diffusion_loss(output, x0, x_t, noise, timesteps, diffusion)
    if teacher is not None and stage.distill_weight:
        with torch.no_grad():
            target = teacher(x_t, timesteps, classes)
        loss = loss + stage.distill_weight * (output - target).square().mean()
    return loss


def _save(path: Path, model: DiT, optimiser: torch.optim.Optimizer, average: EMA, step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "ema": average.shadow, "optimiser": optimiser.state_dict()}
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(path: Path, model: DiT, optimiser: torch.optim.Optimizer, average: EMA) -> int:
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    average.restore(state["ema"])
    return int(state["step"])


@torch.inference_mode()
def draw_samples(
    model: DiT, count: int, seed: int, sampler: SamplerConfig, diffusion: DiffusionConfig
) -> tuple[Tensor, Tensor]:
    """``count`` samples in [-1, 1], float32 ``[count, C, S, S]``, and their classes (in turn), ``[count]``.

    No guidance. The noise depends on ``seed`` alone, so runs with one seed start from the same.
    """
    config = model.config
    classes = torch.arange(count) % config.num_classes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size, generator=generator)
    table = step_table(sampler.sampler, sampler.steps)
    coefficients = step_coefficients(sampler.sampler, sampler.steps, diffusion.prediction_type)
    drawn = []
    for first in range(0, count, _SAMPLE_BATCH):
        rows = slice(first, first + _SAMPLE_BATCH)
        drawn.append(_walk(model, x[rows], classes[rows], table.timesteps, coefficients, diffusion, generator))
    return torch.cat(drawn).clamp(-1, 1), classes


def _walk(
    model: DiT,
    x: Tensor,
    classes: Tensor,
    timesteps: tuple[int, ...],
    coefficients: tuple[Tensor, ...],
    diffusion: DiffusionConfig,
    generator: torch.Generator,
) -> Tensor:
    """All steps of one batch, from noise to images; see :mod:`robuq_core.diffusion.samplers`."""
    previous = torch.zeros_like(x)
    for timestep, row in zip(timesteps, coefficients, strict=True):
        step = Coefficients(*row)
        output = model(x, torch.full((len(x),), timestep), classes)[:, : x.shape[1]]
        x0 = step.x0_on_xt * x + step.x0_on_output * output
        if diffusion.clip_sample:
            x0 = x0.clamp(-1, 1)
        x = step.on_xt * x + step.on_x0 * x0 + step.on_previous_x0 * previous
        if float(step.std):
            x = x + step.std * torch.randn(x.shape, generator=generator)
        previous = x0
    return x
