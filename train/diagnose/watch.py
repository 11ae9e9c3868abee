"""What is kept of a model's layers, and how it is gathered while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robuq_core.quant.choices import ActivationRule, Grid
from train.data import step_generator
from train.diagnose.capture import LayerInput
from train.diagnose.shape import Shape, ShapeStatistics
from train.evaluation.errors import EvaluationError

TOKENS_A_FORWARD = 256  # of each layer, picked anew by a fixed seed
_STREAM = 9  # of the random numbers that pick them


@dataclass(frozen=True)
class LayerDiagnosis:
    """A layer's input: how it is treated, and its shape before and after the rotation."""

    name: str
    width: int
    bits: int
    rotation_block: int | None
    before: Shape
    after: Shape


@dataclass(frozen=True)
class Diagnosis:
    """``source`` says which activations these are; ``grid`` and ``rule`` are the quantiser that errors are of."""

    model: str
    source: str
    grid: Grid
    rule: ActivationRule
    layers: tuple[LayerDiagnosis, ...]


class LayerWatch:
    """Statistics of every layer, from a random part of its tokens at each forward."""

    def __init__(self, inputs: dict[str, LayerInput], seed: int) -> None:
        self.inputs, self._seed = inputs, seed
        self._order = {name: i for i, name in enumerate(inputs)}
        self._forwards = dict.fromkeys(inputs, 0)
        self._before = {name: ShapeStatistics(each.grid, each.rule) for name, each in inputs.items()}
        self._after = {name: ShapeStatistics(each.grid, each.rule) for name, each in inputs.items()}

    @torch.no_grad()
    def __call__(self, name: str, tokens: Tensor) -> None:
        """See one forward's ``tokens [M, K]`` of layer ``name``."""
        step = self._forwards[name] * len(self.inputs) + self._order[name]
        self._forwards[name] += 1
        if len(tokens) > TOKENS_A_FORWARD:
            chosen = torch.randperm(len(tokens), generator=step_generator(self._seed, step, stream=_STREAM))
            tokens = tokens[chosen[:TOKENS_A_FORWARD].to(tokens.device)]
        self._before[name].add(tokens)
        self._after[name].add(self.inputs[name].rotation(tokens.float()))

    def result(self, model: str, source: str) -> Diagnosis:
        """Raises:
        EvaluationError: a layer saw nothing but zeros.
        """
        layers = []
        for name, each in self.inputs.items():
            try:
                before, after = self._before[name].result(), self._after[name].result()
            except ValueError as error:
                raise EvaluationError(f"{model}: the input of {name} is always zero: train it first") from error
            layers.append(LayerDiagnosis(name, each.width, each.bits, each.rotation.block, before, after))
        first = next(iter(self.inputs.values()))
        return Diagnosis(model, source, first.grid, first.rule, tuple(layers))
