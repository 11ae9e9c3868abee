"""The training loop of every stage: seeded by step, resumable after a kill with no step lost or doubled."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from robuq_core.config import NUM_TRAIN_TIMESTEPS, DiffusionConfig
from robuq_core.errors import UserError
from robuq_core.models.dit import DiT
from train import parallel
from train.config import ConfigError, StageConfig, TrainConfig
from train.data import BatchSource, step_generator
from train.logs import TrainingLog
from train.loss import add_noise, diffusion_loss, draw_timesteps, own_sample
from train.messages import one_line
from train.provenance import run_provenance
from train.state import EMA, StateError, check_settings
from train.state_file import read_state_file, save_state
from train.state_shards import is_pointer, read_shards_into, read_whole, save_shards, shards_folder


class TrainingError(UserError):
    """Training ended before its last step; the last saved state is intact."""


def meaning_of_weights(config: TrainConfig) -> dict[str, Any]:
    """The settings that a state must share with the run that reads it: see :func:`train.state.check_settings`."""
    model = {f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()}
    return {**model, "diffusion.prediction_type": config.diffusion.prediction_type}


def learning_rate(stage: StageConfig, step: int) -> float:
    """Rate of ``step``: linear warm-up, then constant or half a cosine down to ``final_lr_ratio``."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    if stage.lr_schedule == "constant":
        return stage.lr * warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.steps)))
    return stage.lr * warm * (stage.final_lr_ratio + (1 - stage.final_lr_ratio) * cosine)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware: AMX or AVX512-BF16 on a CPU, compute capability 8 on a GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where asked for, or where ``auto`` finds hardware for it."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@dataclass(frozen=True)
class NoisyBatch:
    """What a step trains on: images and noise ``[B, C, H, W]``, timesteps and classes ``[B]``.

    ``own``, if given: bool ``[B]``, the rows whose input is the model's own sample (see :func:`batch_loss`).
    """

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    classes: Tensor
    own: Tensor | None = None


def batch_loss(
    forward: Callable[..., Tensor],
    batch: NoisyBatch,
    diffusion: DiffusionConfig,
    context: AbstractContextManager[None],
    teach: Callable[..., Tensor] | None = None,
    distill_weight: float = 0.0,
) -> Tensor:
    """Mean loss of ``batch``, plus ``distill_weight`` times the MSE to what ``teach`` says; both run in ``context``.

    Rows of ``batch.own`` see what the model sees when it samples: not the noised image, but what one step of DDIM
    makes of pure noise and the model's own estimate. They teach it to mend its estimate. Noised images teach it to
    trust ``x_t``, so that its errors grow with the number of steps (the idea of arXiv 2312.00210).
    """
    x_t = add_noise(batch.x0, batch.noise, batch.timesteps, diffusion.prediction_type)
    with context:
        if batch.own is not None:
            last = torch.full_like(batch.timesteps, NUM_TRAIN_TIMESTEPS - 1)
            with torch.no_grad():
                estimate = forward(batch.noise, last, batch.classes).float()
            own = own_sample(batch.noise, estimate, last, batch.timesteps, diffusion)
            x_t = torch.where(batch.own[:, None, None, None], own, x_t)
        output = forward(x_t, batch.timesteps, batch.classes).float()
        if teach is not None:
            with torch.no_grad():
                target = teach(x_t, batch.timesteps, batch.classes).float()
    loss = diffusion_loss(output, batch.x0, x_t, batch.noise, batch.timesteps, diffusion)
    if teach is not None:
        loss = loss + distill_weight * (output - target).square().mean()
    return loss


def check_shares(stage: StageConfig, key: str, world: int) -> None:
    """Refuse a batch that does not divide evenly: the means of its shares would not average to its mean.

    Raises:
        ConfigError: naming ``key`` and what would do.
    """
    parts = world * stage.accumulate
    if stage.batch_size % parts:
        raise ConfigError(f"{key} {stage.batch_size} must be a multiple of {parts}: {world} processes times "
                          f"accumulate {stage.accumulate}")  # fmt: skip


class Trainer:
    """Runs one stage of ``model`` on ``source`` and keeps ``state_path`` up to date.

    ``teacher``, if given with a positive ``distill_weight``, adds the MSE to its output. Inside
    :func:`train.parallel.processes` every process makes a trainer of the same arguments, and all of them train one
    model: the batch of a step, its noise, timesteps and dropped labels do not depend on how many they are.

    Raises:
        ConfigError: the batch does not divide between the processes. StateError: the saved state cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: StageConfig,
        model: DiT,
        source: BatchSource,
        state_path: Path,
        teacher: DiT | None = None,
    ) -> None:
        self.config, self.stage, self.source, self.state_path = config, stage, source, state_path
        check_shares(stage, f"{state_path.stem}.batch_size", parallel.world_size())
        self.device = parallel.training_device()
        self.model = model.to(self.device)
        if stage.activation_checkpointing:
            parallel.checkpoint_blocks(self.model)
        self._forward = parallel.spread(self.model, stage.parallel, config.compile, self.device)
        self.teacher = self._teach = None
        if teacher is not None and stage.distill_weight:
            self.teacher = teacher.to(self.device).eval().requires_grad_(False)
            self._teach = parallel.spread(self.teacher, stage.parallel, config.compile, self.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.ema = EMA(self.model, stage.ema_decay)
        self.step = 0
        # One entry a start of this stage: a resumed run may have another commit or configuration.
        self.history: list[dict[str, Any]] = []
        self._asked_to_stop: signal.Signals | None = None
        self._stopped_by: signal.Signals | None = None
        if state_path.exists():
            self._resume()
        if not parallel.same_everywhere(self.step):
            raise StateError(f"{state_path}: the processes see different states; run_dir must lie on a disk that all "
                             "of them share")  # fmt: skip
        if self.step < stage.steps:
            start = {"from_step": self.step, "processes": parallel.world_size()}
            self.history.append({**start, **run_provenance(config)})

    def _resume(self) -> None:
        state = read_state_file(self.state_path)
        check_settings(self.state_path, state, meaning_of_weights(self.config))
        try:
            if is_pointer(state) and parallel.is_sharded(self.model):
                self._restore_shards(state)
            else:
                self._restore(read_whole(self.state_path, state) if is_pointer(state) else state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise StateError(f"{self.state_path}: does not fit the configuration ({one_line(error)}); "
                             "restore the configuration it was made with, or delete it") from error  # fmt: skip
        self.step, self.history = state["step"], list(state["history"])

    def _restore(self, state: dict[str, Any]) -> None:
        own = self.model.state_dict()
        weights = {name: parallel.sharded_like(value, own.get(name, value)) for name, value in state["model"].items()}
        self.model.load_state_dict(weights)
        moments = {
            i: {name: parallel.sharded_like(value, parameter) for name, value in state["optimiser"]["state"][i].items()}
            for i, parameter in enumerate(self.model.parameters())
            if i in state["optimiser"]["state"]
        }
        self.optimiser.load_state_dict({**state["optimiser"], "state": moments})
        shadow = self.ema.shadow
        self.ema.restore(
            {name: parallel.sharded_like(value, shadow.get(name, value)) for name, value in state["ema"].items()}
        )

    def _restore_shards(self, pointer: dict[str, Any]) -> None:
        moments = {
            i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for i, p in enumerate(self.model.parameters())
            if p.numel()
        }
        weights = self.model.state_dict()
        read_shards_into(self.state_path, pointer, model=weights, ema=self.ema.shadow, moments=moments)
        self.model.load_state_dict(weights)
        self.optimiser.load_state_dict({"state": moments, "param_groups": pointer["param_groups"]})

    def save(self) -> None:
        """Write the state of the current step; a state that was there before stays until the new one is whole."""
        state: dict[str, Any] = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.shadow,
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
        }
        if parallel.is_sharded(self.model):
            save_shards(self.state_path, **state)
        else:
            parallel.on_first(lambda: self._save_whole(state))

    def _save_whole(self, state: dict[str, Any]) -> None:
        save_state(self.state_path, **state)
        shutil.rmtree(shards_folder(self.state_path), ignore_errors=True)  # of a run that was sharded before

    def run(self) -> None:
        """Train up to ``stage.steps``, saving as it goes; SIGTERM and SIGINT save and end the run early.

        Raises:
            TrainingError: the loss is no longer finite, or a signal ended the run. StateError: the disk is full.
        """
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        log = TrainingLog(self.state_path, self.step) if parallel.rank() == 0 else None
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        ended = False
        try:
            self._loop(log)
            ended = self._stopped_by is None
        finally:
            if log is not None:
                log.close()
            # torchrun ends every process with SIGTERM as soon as one has ended: not before this one has said why.
            if ended or parallel.world_size() == 1:
                for number, handler in previous.items():
                    signal.signal(number, handler)
        if self.step < self.stage.steps and self._stopped_by is not None:
            parallel.stop_all(
                TrainingError(f"stopped by {self._stopped_by.name} at step {self.step} of {self.stage.steps}, which "
                              f"{self.state_path} holds; run again to go on")
            )  # fmt: skip

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = signal.Signals(number)

    def _loop(self, log: TrainingLog | None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        running, since, started, saved = 0.0, 0, time.perf_counter(), -1
        with Progress(*columns, disable=log is None) as progress:
            task = progress.add_task(self.state_path.stem, total=self.stage.steps, completed=self.step)
            while self.step < self.stage.steps and self._stopped_by is None:
                loss, norm = self._train_step()
                running += loss
                since += 1
                self.step += 1
                progress.update(task, completed=self.step)
                if self.step % self.stage.log_every == 0:
                    if log is not None:
                        rate = since / (time.perf_counter() - started)
                        lr = learning_rate(self.stage, self.step - 1)
                        log.write(self.step, loss=running / since, lr=lr, grad_norm=norm, steps_per_second=rate)
                    running, since, started = 0.0, 0, time.perf_counter()
                if self.step % self.stage.save_every == 0:
                    self.save()
                    saved = self.step
        if saved != self.step:
            self.save()

    def _train_step(self) -> tuple[float, float]:
        """One step of all processes; the loss and the gradient's norm before it was clipped."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.stage, self.step)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(self._batches(self.step)):
            last = i == self.stage.accumulate - 1
            with nullcontext() if last else parallel.without_averaging(self._forward):
                part = self._loss(batch) / self.stage.accumulate
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        # Without a limit this only measures: a gradient that overflowed would spoil the weights one step before
        # the loss shows it, and that step may be one that is saved.
        limit = math.inf if self.stage.grad_clip is None else self.stage.grad_clip
        norm = parallel.clip_gradients(self.model, limit)
        value, self._stopped_by = parallel.agree(loss, self._asked_to_stop)
        if not (math.isfinite(value) and math.isfinite(norm)):
            parallel.stop_all(
                TrainingError(f"loss is {value} and the gradient's norm {norm} at step {self.step}; lower "
                              f"{self.state_path.stem}.lr and run again: training goes on from the last saved state")
            )  # fmt: skip
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        return value, norm

    def _batches(self, step: int) -> Iterator[NoisyBatch]:
        """The parts of the batch of ``step`` that are this process's.

        The numbers of the whole batch are drawn, whoever needs which: they do not depend on how many share it.
        """
        rank, world, size = parallel.rank(), parallel.world_size(), self.stage.batch_size
        mine = slice(rank * size // world, (rank + 1) * size // world)
        x0, classes = self.source.batch(step, rank, world)
        generator = step_generator(self.config.seed, step)
        noise = torch.randn((size, *x0.shape[1:]), generator=generator)[mine]
        timesteps = draw_timesteps(size, generator, self.config.diffusion.prediction_type)[mine]
        dropped = torch.rand(size, generator=generator)[mine] < self.config.class_dropout
        classes = torch.where(dropped, self.config.model.null_row, classes)
        drawn = [x0, noise, timesteps, classes]
        if self.stage.own_samples:
            drawn.append(torch.rand(size, generator=generator)[mine] < self.stage.own_samples)
        parts = zip(*(each.chunk(self.stage.accumulate) for each in drawn), strict=True)
        return (NoisyBatch(*(each.to(self.device) for each in part)) for part in parts)

    def _loss(self, batch: NoisyBatch) -> Tensor:
        context = autocast(self.config.precision, self.device)
        return batch_loss(self._forward, batch, self.config.diffusion, context, self._teach, self.stage.distill_weight)
