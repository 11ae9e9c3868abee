"""The training loop of every stage: seeded by step, resumable after a kill with no step lost or doubled."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from train.config import StageConfig, TrainConfig
from train.data import BatchSource, step_generator
from train.loss import add_noise, diffusion_loss, draw_timesteps
from train.messages import one_line
from train.provenance import run_provenance
from train.state import EMA, StateError, check_settings, load_state, save_state


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


class Trainer:
    """Runs one stage of ``model`` on ``source`` and keeps ``state_path`` up to date.

    ``teacher``, if given with a positive ``distill_weight``, adds the MSE to its output.
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
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.teacher = teacher.to(self.device).eval() if teacher is not None and stage.distill_weight else None
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.ema = EMA(self.model, stage.ema_decay)
        self.step = 0
        # One entry a start of this stage: a resumed run may have another commit or configuration.
        self.history: list[dict[str, Any]] = []
        self._forward = self._compiled(self.model)
        self._teach = self._compiled(self.teacher) if self.teacher is not None else None
        self._stopped_by: signal.Signals | None = None
        if state_path.exists():
            self._resume()
        if self.step < stage.steps:
            self.history.append({"from_step": self.step, **run_provenance(config)})

    def _compiled(self, model: nn.Module) -> Callable[..., Tensor]:
        return torch.compile(model) if self.config.compile else model

    def _resume(self) -> None:
        state = load_state(self.state_path)
        check_settings(self.state_path, state, meaning_of_weights(self.config))
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.ema.restore(state["ema"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise StateError(f"{self.state_path}: does not fit the configuration ({one_line(error)}); "
                             "restore the configuration it was made with, or delete it") from error  # fmt: skip
        self.step, self.history = state["step"], list(state["history"])

    def save(self) -> None:
        save_state(
            self.state_path,
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.shadow,
            optimiser=self.optimiser.state_dict(),
            history=self.history,
        )

    def run(self) -> None:
        """Train up to ``stage.steps``, saving as it goes; SIGTERM and SIGINT save and end the run early.

        Raises:
            TrainingError: the loss is no longer finite, or a signal ended the run. StateError: the disk is full.
        """
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        self._forget_later_records()
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.step < self.stage.steps and self._stopped_by is not None:
            raise TrainingError(f"stopped by {self._stopped_by.name} at step {self.step} of {self.stage.steps}, which "
                                f"{self.state_path} holds; run again to go on")  # fmt: skip

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = signal.Signals(number)

    def _loop(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        running, since, started = 0.0, 0, time.perf_counter()
        with Progress(*columns) as progress:
            task = progress.add_task(self.state_path.stem, total=self.stage.steps, completed=self.step)
            while self.step < self.stage.steps and self._stopped_by is None:
                running += self._train_step()
                since += 1
                self.step += 1
                progress.update(task, completed=self.step)
                if self.step % self.stage.log_every == 0:
                    self._log(running / since, since / (time.perf_counter() - started))
                    running, since, started = 0.0, 0, time.perf_counter()
                if self.step % self.stage.save_every == 0:
                    self.save()
        self.save()

    def _train_step(self) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.stage, self.step)
        loss = self._loss(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        # Without a limit this only measures: a gradient that overflowed would spoil the weights one step before
        # the loss shows it, and that step may be one that is saved.
        limit = math.inf if self.stage.grad_clip is None else self.stage.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"loss is {value} and the gradient's norm {norm} at step {self.step}; lower {self.state_path.stem}.lr "
                "and run again: training goes on from the last saved state"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        return value

    def _loss(self, step: int) -> Tensor:
        generator = step_generator(self.config.seed, step)
        x0, classes = self.source.batch(step)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = draw_timesteps(len(x0), generator)
        dropped = torch.rand(len(x0), generator=generator) < self.config.class_dropout
        classes = torch.where(dropped, self.config.model.null_class, classes)
        x0, noise, timesteps, classes = (each.to(self.device) for each in (x0, noise, timesteps, classes))
        x_t = add_noise(x0, noise, timesteps)
        with autocast(self.config.precision, self.device):
            output = self._forward(x_t, timesteps, classes).float()
            if self._teach is not None:
                with torch.no_grad():
                    target = self._teach(x_t, timesteps, classes).float()
        loss = diffusion_loss(output, x0, x_t, noise, timesteps, self.config.diffusion)
        if self._teach is not None:
            loss = loss + self.stage.distill_weight * (output - target).square().mean()
        return loss

    def _log(self, loss: float, steps_per_second: float) -> None:
        record = {
            "step": self.step,
            "loss": round(loss, 6),
            "lr": learning_rate(self.stage, self.step - 1),
            "steps_per_second": round(steps_per_second, 3),
        }
        with self._log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @property
    def _log_path(self) -> Path:
        return self.state_path.with_suffix(".log.jsonl")

    def _forget_later_records(self) -> None:
        """Drop the records of steps after the saved one, which a killed run logged and this one takes again."""
        if not self._log_path.exists():
            return
        lines = self._log_path.read_text().splitlines()
        kept = [line for line in lines if _logged_step(line) <= self.step]
        if kept != lines:
            with replacing(self._log_path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))


def _logged_step(line: str) -> float:
    """The step of a record; infinite for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
