"""The training loop of every stage: seeded by step, resumable after a kill with no step lost or doubled."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from robuq_core.config import NUM_TRAIN_TIMESTEPS, DiffusionConfig
from robuq_core.errors import UserError
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import held_codes
from robuq_core.models.shapes import layer_macs
from train import parallel
from train.config import ConfigError, StageConfig, TrainConfig
from train.data import BatchSource, Prefetcher, sample_noise, step_generator
from train.logs import TrainingLog, one_line, progress_bar
from train.loss import add_noise, diffusion_loss, draw_timesteps, own_sample
from train.provenance import run_provenance
from train.state import EMA, Saver, State, StateError, find_state, further_average

# Steps between looks at the loss, and at the signals of other processes: each look waits for the device.
_CHECK_EVERY = 10


class TrainingError(UserError):
    """Training ended before its last step; the last saved state is intact."""


class DivergedError(TrainingError):
    """The loss or the gradient is no longer finite."""


def meaning_of_weights(config: TrainConfig) -> dict[str, Any]:
    """The settings that a state must share with the run that reads it: see :meth:`train.state.State.check`."""
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

    def parts(self, count: int) -> Iterator[NoisyBatch]:
        """The batch in ``count`` equal parts."""
        for i in range(count):
            yield self._each(lambda tensor: tensor.chunk(count)[i])  # noqa: B023  # called at once

    def to(self, device: torch.device) -> NoisyBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> NoisyBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> NoisyBatch:
        own = None if self.own is None else change(self.own)
        return NoisyBatch(change(self.x0), change(self.noise), change(self.timesteps), change(self.classes), own)


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

    Raises ConfigError: naming ``key`` and what would do.
    """
    parts = world * stage.accumulate
    if stage.batch_size % parts:
        raise ConfigError(f"{key} {stage.batch_size} must be a multiple of {parts}: {world} processes times "
                          f"accumulate {stage.accumulate}")  # fmt: skip


def repeats_forwards(stage: StageConfig) -> bool:
    """Whether a step uses a weight in more than one forward, so that its ternary codes are worth keeping."""
    return stage.accumulate > 1 or stage.activation_checkpointing or stage.own_samples > 0


def step_flops(config: TrainConfig, stage: StageConfig) -> int:
    """Operations of the products in one step of ``stage``, two for a multiply-accumulate.

    Of every image one forward and twice that backward; one forward more each for recomputed activations, a distilled
    teacher and a model's own samples. The low-rank branch and attention are not counted: some 5%.
    """
    forwards = 3 + stage.activation_checkpointing + bool(stage.distill_weight) + bool(stage.own_samples)
    return 2 * forwards * sum(layer_macs(config.model).values()) * stage.batch_size


class Trainer:
    """Runs one stage of ``model`` on ``source`` and saves its states below ``states``, ``RUN_DIR/states/STAGE``.

    ``teacher``, if given with a positive ``distill_weight``, adds the MSE to its output. ``inputs``: what the stage is
    made from, by name, kept in every state. ``watch``, called every ``eval_every`` steps with the averaged model and
    the step, gives figures to log. Inside :func:`train.parallel.processes` every process makes a trainer of the same
    arguments, and all of them train one model: the batch of a step, its noise, timesteps and dropped labels do not
    depend on how many they are.

    Raises ConfigError: the batch does not divide between the processes. StateError: the saved state cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: StageConfig,
        model: DiT,
        source: BatchSource,
        states: Path,
        *,
        teacher: DiT | None = None,
        inputs: Mapping[str, Any] | None = None,
        watch: Callable[[DiT, int], dict[str, float]] | None = None,
    ) -> None:
        self.config, self.stage, self.source, self.states, self.name = config, stage, source, states, states.name
        self.inputs, self.watch = {**meaning_of_weights(config), **(inputs or {})}, watch
        check_shares(stage, f"{self.name}.batch_size", parallel.world_size())
        self.device = parallel.training_device()
        self.model = model.to(self.device)
        if stage.activation_checkpointing:
            parallel.checkpoint_blocks(self.model)
        if self.device.type == "cuda" and config.precision != "fp32":
            torch.set_float32_matmul_precision("high")  # TF32
        bf16 = stage.gradients == "bf16"
        self._forward = parallel.spread(self.model, stage.parallel, config.compile, self.device, bf16_gradients=bf16)
        self.teacher = self._teach = None
        if teacher is not None and stage.distill_weight:
            self.teacher = teacher.to(self.device).eval().requires_grad_(False)
            self._teach = parallel.spread(self.teacher, stage.parallel, config.compile, self.device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.ema = EMA(self.model, stage.ema_decay)
        self.averages = [self.ema, *(EMA(self.model, each, further_average(each)) for each in stage.more_ema_decays)]
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._saver = Saver()
        self._unchecked: list[tuple[Tensor, Tensor]] = []  # loss and gradient norm of each step since the last check
        self._asked_to_stop: signal.Signals | None = None
        self._stopped_by: signal.Signals | None = None
        state = find_state(states)
        step = -1 if state is None else state.step
        if parallel.any_of(None if parallel.from_first(lambda: step) == step else "another") is not None:
            raise StateError(f"{states}: the processes see different states; run_dir must lie on a disk that all of "
                             "them share")  # fmt: skip
        if state is not None:
            self._resume(state)
        if self.step < stage.steps:
            start = {"from_step": self.step, "processes": parallel.world_size()}
            self.history.append({**start, **run_provenance(config, self.inputs.get("content of data.path"))})

    def _resume(self, state: State) -> None:
        state.check(meaning_of_weights(self.config))
        for p in self.model.parameters():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimiser.state[p] = {"step": torch.zeros((), device=self.device), **moments}
        try:
            state.restore(self._tensors())
        except ValueError as error:
            raise StateError(f"{state.folder}: does not fit the configuration ({one_line(error)}); restore the "
                             "configuration it was made with, or rerun the stage with --redo") from error  # fmt: skip
        self.step, self.history = state.step, list(state.history)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that training continues from, by name: the very tensors, so that reading fills them."""
        return {
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"{each.prefix}{name}": value for each in self.averages for name, value in each.shadow.items()},
            **{f"optimiser.{name}.{key}": value for name, p in self.model.named_parameters() if p.numel()
               for key, value in self.optimiser.state[p].items()},
        }  # fmt: skip

    def save(self) -> None:
        """Start writing the state of this step, after the state before; a state is whole or absent."""
        step, stage = self.step, self.stage
        state = State(
            folder=self.states / f"step-{step:07d}",
            step=step,
            finished=step == stage.steps,
            kept=stage.keep_every is not None and step % stage.keep_every == 0,
            inputs=self.inputs,
            history=self.history,
        )
        self._saver.save(state, self._tensors())

    def run(self) -> None:
        """Train up to ``stage.steps``, saving as it goes; SIGTERM and SIGINT save and end the run early.

        Raises TrainingError: the loss is no longer finite, or a signal ended the run. StateError: the disk is full.
        """
        log = None
        if parallel.rank() == 0:
            run_dir = self.states.parent.parent
            log = TrainingLog(run_dir, self.name, self.step, self.stage.steps, self.config.wandb)
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        ended = False
        try:
            try:
                self._loop(log)
            finally:
                self._saver.wait()  # also of a run that failed: no other may save meanwhile
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
                              f"{self.states} holds; run again to continue")
            )  # fmt: skip

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = signal.Signals(number)

    def _loop(self, log: TrainingLog | None) -> None:
        stage, losses, started, saved = self.stage, list[float](), time.perf_counter(), -1
        with closing(Prefetcher(self._batch, self.step, stage.steps)) as batches, progress_bar(log) as bar:
            task = bar.add_task(self.name, total=stage.steps, completed=self.step)
            while self.step < stage.steps and self._stopped_by is None:
                self._train_step(batches.next())
                self.step += 1
                bar.update(task, completed=self.step)
                logs, saves = self.step % stage.log_every == 0, self.step % stage.save_every == 0
                watches = stage.eval_every is not None and self.step % stage.eval_every == 0
                if logs or saves or watches or self._is_check_due():
                    found, norm = self._check()
                    losses += found
                if logs:
                    if log is not None:
                        rate = len(losses) / (time.perf_counter() - started)
                        log.write(
                            self.step,
                            loss=sum(losses) / len(losses),
                            lr=learning_rate(stage, self.step - 1),
                            grad_norm=norm,
                            steps_per_second=rate,
                            images_per_second=rate * stage.batch_size,
                            model_teraflops=rate * step_flops(self.config, stage) / 1e12,
                        )
                    losses, started = [], time.perf_counter()
                if saves:
                    self.save()
                    saved = self.step
                if self.watch is not None and watches:
                    with self.ema.applied_to(self.model):
                        figures = self.watch(self.model, self.step)
                    if log is not None:
                        log.write(self.step, **figures)
        if saved != self.step:
            self.save()

    def _is_check_due(self) -> bool:
        if self.step == self.stage.steps or self.step % _CHECK_EVERY == 0:
            return True
        return parallel.world_size() == 1 and self._asked_to_stop is not None

    def _check(self) -> tuple[list[float], float]:
        """Mean losses of the steps since the last check, and the last gradient norm; waits for the device once.

        Before every save: weights that a loss or gradient has spoiled are never written.
        """
        pending, self._unchecked = self._unchecked, []
        norms = torch.stack([norm for _, norm in pending])
        losses, self._stopped_by = parallel.agree(torch.stack([loss for loss, _ in pending]), self._asked_to_stop)
        for i, (loss, norm) in enumerate(zip(losses, norms.tolist(), strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                parallel.stop_all(
                    DivergedError(f"loss is {loss} and the gradient's norm {norm} at step "
                                  f"{self.step - len(pending) + i}; lower {self.name}.lr and run again: "
                                  "training continues from the last saved state")
                )  # fmt: skip
        return losses, norm

    def _train_step(self, batch: NoisyBatch) -> None:
        """One step of all processes, without waiting for the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.stage, self.step)
        loss = torch.zeros((), device=self.device)
        # Slices of sharded weights are gathered for each forward anew.
        held = repeats_forwards(self.stage) and not parallel.is_sharded(self.model)
        with held_codes(self.model) if held else nullcontext():
            for i, part in enumerate(batch.parts(self.stage.accumulate)):
                last = i == self.stage.accumulate - 1
                with nullcontext() if last else parallel.without_averaging(self._forward):
                    share = self._loss(part.to(self.device)) / self.stage.accumulate
                    share.backward()  # type: ignore[no-untyped-call]
                loss += share.detach()
        # Without a limit this only measures.
        norm = parallel.clip_gradients(self.model, math.inf if self.stage.grad_clip is None else self.stage.grad_clip)
        self._unchecked.append((loss, norm))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for each in self.averages:
            each.update(self.model, self.step)

    def _batch(self, step: int) -> NoisyBatch:
        """This process's share of the batch of ``step``, in page-locked memory where a GPU is to read it."""
        rank, world, size = parallel.rank(), parallel.world_size(), self.stage.batch_size
        mine, (x0, classes) = self.source.share(rank, world), self.source.batch(step, rank, world)
        noise = sample_noise(self.config.seed, step, size, mine, x0.shape[1:], stream=3)
        generator = step_generator(self.config.seed, step)
        timesteps = draw_timesteps(size, generator, self.config.diffusion.prediction_type)[mine]
        dropped = torch.rand(size, generator=generator)[mine] < self.config.class_dropout
        classes = torch.where(dropped, self.config.model.null_row, classes)
        own = None
        if self.stage.own_samples:
            own = torch.rand(size, generator=generator)[mine] < self.stage.own_samples
        batch = NoisyBatch(x0, noise, timesteps, classes, own)
        return batch.pinned() if self.device.type == "cuda" else batch

    def _loss(self, batch: NoisyBatch) -> Tensor:
        context = autocast(self.config.precision, self.device)
        return batch_loss(self._forward, batch, self.config.diffusion, context, self._teach, self.stage.distill_weight)
