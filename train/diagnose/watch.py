"""What is kept of a model's layers, and how it is gathered while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robuq_core.quant.activation import fake_quantize_activation
from robuq_core.quant.attention import quantized_attention
from robuq_core.quant.choices import ActivationRule, Grid
from train.data import step_generator
from train.diagnose.capture import LayerInput
from train.diagnose.shape import Shape, ShapeStatistics
from train.evaluation.networks import EvaluationError

TOKENS_A_FORWARD = 256  # of each layer, picked anew by a fixed seed
IMAGES_A_FORWARD = 4  # of each attention, evenly spaced
_SMALLEST = 1e-30
_STREAM = 9  # of the random numbers that pick them


@dataclass(frozen=True)
class LayerDiagnosis:
    """A layer's input: how it is treated, and its shape before and after the rotation.

    ``output_error``: ``|(x - Q(x)) W^T|^2 / |x W^T|^2`` at the layer's own width, of ``x`` quantised without the
    rotation and with it; ``W`` in the numerator is the part of the weight that sees quantised activations.
    """

    name: str
    width: int
    bits: int
    rotation_block: int | None
    before: Shape
    after: Shape
    output_error: tuple[float, float]

    @property
    def rotation_hurts(self) -> bool:
        """The output is further off with the rotation than without it."""
        return self.output_error[1] > self.output_error[0]


@dataclass(frozen=True)
class HeadDiagnosis:
    """A head of attention. ``logit_sd``: standard deviation of a query's logits over the keys (root mean square over
    queries). ``error``: ``|quantised - exact| / |exact|`` of the head's output, of 8-bit attention."""

    block: int
    head: int
    logit_sd: float
    error: float


@dataclass(frozen=True)
class Diagnosis:
    """``source`` says which activations these are; ``grid`` and ``rule`` are the quantiser that errors are of."""

    model: str
    source: str
    grid: Grid
    rule: ActivationRule
    layers: tuple[LayerDiagnosis, ...]
    heads: tuple[HeadDiagnosis, ...] = ()


class LayerWatch:
    """Statistics of every layer, from a random part of its tokens at each forward, and of every head, from some images
    of each."""

    def __init__(self, inputs: dict[str, LayerInput], num_heads: int, seed: int) -> None:
        self.inputs, self._num_heads, self._seed = inputs, num_heads, seed
        self._outputs = {name: torch.zeros(3, dtype=torch.float64) for name in inputs}
        self._heads: dict[int, Tensor] = {}
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
        layer = self.inputs[name]
        tokens = tokens.float()
        rotated = layer.rotation(tokens)
        self._before[name].add(tokens)
        self._after[name].add(rotated)
        seen, whole = (weight.to(tokens.device) for weight in layer.weights())
        lost = [x - fake_quantize_activation(x, layer.bits, layer.grid, layer.rule) for x in (tokens, rotated)]
        products = (layer.rotation(lost[0]) @ seen.T, lost[1] @ seen.T, rotated @ whole.T)
        self._outputs[name] += torch.stack([product.double().square().sum() for product in products]).cpu()

    @torch.no_grad()
    def attention(self, name: str, qkv: Tensor) -> None:
        """See one forward's ``qkv [B, L, 3 D]`` of layer ``name``."""
        images, length, _ = qkv.shape
        chosen = torch.linspace(0, images - 1, min(images, IMAGES_A_FORWARD)).round().long()
        heads = qkv[chosen.to(qkv.device)].float().reshape(len(chosen), length, 3, self._num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        variance = logits.var(dim=-1, correction=0)
        exact = logits.softmax(dim=-1) @ v
        lost = quantized_attention(q, k, v) - exact
        sums = [x.double().sum(dim=(0, *range(2, x.dim()))) for x in (variance, lost.square(), exact.square())]
        count = torch.full_like(sums[0], len(chosen) * length)
        block = int(name.split(".")[1])
        found = torch.stack([*sums, count]).cpu()
        self._heads[block] = self._heads.get(block, torch.zeros_like(found)) + found

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
            plain, rotated, output = self._outputs[name].tolist()
            errors = (plain / output, rotated / output) if output else (0.0, 0.0)
            layers.append(LayerDiagnosis(name, each.width, each.bits, each.rotation.block, before, after, errors))
        first = next(iter(self.inputs.values()))
        return Diagnosis(model, source, first.grid, first.rule, tuple(layers), self.heads())

    def heads(self) -> tuple[HeadDiagnosis, ...]:
        """Of all attention seen, by block."""
        heads = []
        for block, (variance, lost, exact, count) in sorted(self._heads.items()):
            sd, error = (variance / count).sqrt(), (lost / exact.clamp(min=_SMALLEST)).sqrt()
            heads += [HeadDiagnosis(block, i, float(sd[i]), float(error[i])) for i in range(len(sd))]
        return tuple(heads)
