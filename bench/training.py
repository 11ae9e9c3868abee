"""Steps per second of quantisation-aware training against plain training of the same model, in one run.

``python -m bench.training``: a training step is forward, loss, backward, AdamW and moving average, as ``train`` does
them. Sides take turns. Where the time goes is told by sides that leave one piece out. No figure without its check:
the fake-quantised forward must be the packed reference's, and every side must learn.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from robuq_core.bench.report import machine
from robuq_core.bench.timing import BenchError, Timer, relative_error
from robuq_core.cli_support import reported
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.dit import DiT
from robuq_core.models.presets import preset
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears, quantize_model
from train.loss import add_noise, diffusion_loss, draw_timesteps
from train.state import EMA

PLAIN, QAT = "plain", "W1.58A2"
TOLERANCE = 1e-4
TARGET = 0.75
_LAYER_TOKENS = 64
_WARM_UP = 3

# The width of the ablation study: what two cores train in minutes.
SMALL = ModelConfig(input_size=28, patch_size=7, in_channels=1, hidden_size=128, depth=4, num_heads=4, num_classes=10)


@dataclass(frozen=True)
class SideResult:
    """``speed``: steps per second over plain training's, the median of rounds in which both were timed."""

    name: str
    steps_per_second: float
    speed: float
    loss_before: float
    loss_after: float


def sides() -> dict[str, QuantConfig | None]:
    """By name, how each side is quantised: not at all, as the method says, and with one piece left out."""
    return {
        PLAIN: None,
        QAT: QuantConfig(),
        f"{QAT}, no rotation": QuantConfig(rotation="none"),
        f"{QAT}, no low-rank branch": QuantConfig(rank=0),
        f"{QAT}, float attention": QuantConfig(attention_bits=None),
        f"{QAT}, none of the three": QuantConfig(rotation="none", rank=0, attention_bits=None),
    }


class _Training:
    """One side: a model, its optimiser and average, and one fixed batch to learn."""

    def __init__(self, model: DiT, batch: int, compiled: bool) -> None:
        self.model = model
        config = model.config
        generator = torch.Generator().manual_seed(1)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        self.x0 = torch.rand(shape, generator=generator) * 2 - 1
        self.noise = torch.randn(shape, generator=generator)
        self.timesteps = draw_timesteps(batch, generator, "epsilon")
        self.classes = torch.randint(config.num_classes, (batch,), generator=generator)
        self.x_t = add_noise(self.x0, self.noise, self.timesteps, "epsilon")
        self.forward: Callable[..., Tensor] = torch.compile(model) if compiled else model
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.average, self.steps = EMA(model, 0.999), 0
        self.losses: list[float] = []

    def step(self) -> None:
        output = self.forward(self.x_t, self.timesteps, self.classes)
        loss = diffusion_loss(output, self.x0, self.x_t, self.noise, self.timesteps, DiffusionConfig())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.losses.append(loss.item())
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.model, self.steps)
        self.steps += 1


def check_layers(model: DiT) -> float:
    """Largest relative error of a fake-quantised layer against the packed layer on the reference backend.

    Raises:
        BenchError: it is more than rounding.
    """
    backend, worst = ReferenceBackend(), 0.0
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, layer in quantizable_linears(model):
            assert isinstance(layer, QuantLinear)
            x = torch.randn(_LAYER_TOKENS, layer.weight.shape[1], generator=generator)
            packed = pack_layer(layer)
            error = relative_error(layer(x), backend.ternary_linear(backend.rotate_quantize(x, packed), packed))
            if not error <= TOLERANCE:
                raise BenchError(f"{name}: the trained forward is off the packed one by {error:.3g} of the norm")
            worst = max(worst, error)
    return worst


def measure(
    config: ModelConfig, batch: int, timer: Timer, steps: int, compiled: bool
) -> tuple[list[SideResult], float]:
    """Time every side, ``timer.rounds`` rounds of ``steps`` steps in turns; and the error of :func:`check_layers`.

    Raises:
        BenchError: a side does not learn its batch, or its numbers are not the packed layers'.
    """
    torch.manual_seed(0)
    teacher = DiT(config)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    trainings, error = {}, 0.0
    for name, quant in sides().items():
        model = copy.deepcopy(teacher)
        if quant is not None:
            model = quantize_model(model, quant)
        if name == QAT:
            error = check_layers(model)
        trainings[name] = _Training(model, batch, compiled)
        for _ in range(_WARM_UP):
            trainings[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(timer.rounds):
        for name, training in trainings.items():
            seconds[name].append(timer.seconds(training.step, steps))
    results = []
    for name, training in trainings.items():
        before, after = training.losses[0], training.losses[-1]
        if not (math.isfinite(after) and after < before):
            raise BenchError(f"{name} does not learn: its loss went from {before:.4g} to {after:.4g}")
        speed = median(p / s for p, s in zip(seconds[PLAIN], seconds[name], strict=True))
        results.append(SideResult(name, 1 / median(seconds[name]), speed, before, after))
    return results, error


def show(results: list[SideResult], error: float, console: Console) -> None:
    full = next(each for each in results if each.name == QAT)
    table = Table("side", "steps/s", "of plain training", "step without it", "loss", title="training steps per second")
    for each in results:
        share = full.steps_per_second / each.steps_per_second
        left = f"{share:.0%} of {QAT}'s" if each.name.startswith(f"{QAT},") else ""
        table.add_row(each.name, f"{each.steps_per_second:.2f}", f"{each.speed:.2f}", left,
                      f"{each.loss_before:.3g} -> {each.loss_after:.3g}")  # fmt: skip
    console.print(table, f"{QAT}: {full.speed:.2f} of plain training (target: {TARGET}); layers agree with the packed "
                         f"reference within {error:.1e}", sep="\n")  # fmt: skip


@reported
def main(
    model: Annotated[str | None, typer.Option(help="A preset such as DiT-S/2; default: the ablation study's.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps a side takes in its turn.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="With torch.compile, as train has it.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Time training steps, plain and quantisation-aware, in turns."""
    try:
        config = SMALL if model is None else preset(model)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    timer = Timer.of(torch.device("cpu"), rounds, math.inf)
    results, error = measure(config, batch, timer, steps, compiled)
    show(results, error, Console())
    if out is not None:
        report = {"machine": machine(), "model": config.model_dump(mode="json"), "batch": batch, "compiled": compiled,
                  "layer_error": error, "sides": [asdict(each) for each in results]}  # fmt: skip
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
