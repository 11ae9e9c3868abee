"""Statistics of every layer's input, before and after its rotation, and of every head, forward by forward.

Memory does not grow with the number of inputs: tokens go into sums and a histogram at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robuq_core.quant.activation import MAX_BITS, MIN_BITS, SIGMA_PER_MEAN_ABS, fake_quantize_activation
from robuq_core.quant.attention import quantized_attention
from robuq_core.quant.choices import ActivationRule, Grid
from robuq_core.quant.hadamard import Rotation
from train.data import step_generator
from train.evaluation.networks import EvaluationError

Weights = Callable[[], tuple[Tensor, Tensor]]
BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
_LIMIT, _BINS_PER_SIGMA = 10, 200
_BINS = 2 * _LIMIT * _BINS_PER_SIGMA
_PLOT_LIMIT, _PLOT_BINS_PER_SIGMA = 5, 10
_QUANTILE_STEP = 0.1
_FEWEST_BEYOND = 5  # values that lie beyond the outermost quantile shown
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Shape:
    """What was found of ``tokens`` tokens of ``values`` values in all.

    ``skew``, ``kurtosis`` (excess): of each token about its mean, averaged over tokens; 0 for a normal, but for about
    -6/K of a token of K values. ``ks``: greatest distance between the distribution of ``x / sigma`` and the standard
    normal's, with the quantiser's own ``sigma = sqrt(pi/2) mean|x|`` of each token. ``error``: by bits,
    ``|x - Q_b(x)|^2 / |x|^2`` averaged over tokens. ``density``: of ``x / sigma`` between ``edges``. ``quantiles``:
    (normal's, found) pairs.
    """

    tokens: int
    values: int
    skew: float
    kurtosis: float
    ks: float
    error: dict[int, float]
    edges: list[float] = field(repr=False)
    density: list[float] = field(repr=False)
    quantiles: list[tuple[float, float]] = field(repr=False)


class ShapeStatistics:
    """Takes tokens ``[M, K]`` in any number of calls; see :class:`Shape`."""

    def __init__(self, grid: Grid = "midrise", rule: ActivationRule = "gaussian") -> None:
        self._grid, self._rule = grid, rule
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._tokens = 0
        self._sums = torch.zeros(2 + len(BITS), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Tokens of zeros alone, which any quantiser gets right, are skipped."""
        x = x.detach().float()
        x = x[x.abs().sum(dim=1) > 0]
        if not len(x):
            return
        self._tokens += len(x)
        self._counts += _histogram(x / (SIGMA_PER_MEAN_ABS * x.abs().mean(dim=1, keepdim=True))).cpu()
        skew, kurtosis = _token_moments(x)
        self._sums[0] += skew.double().sum().cpu()
        self._sums[1] += kurtosis.double().sum().cpu()
        power = x.double().square().sum(dim=1)
        for i, bits in enumerate(BITS):
            lost = (x - fake_quantize_activation(x, bits, self._grid, self._rule)).double().square().sum(dim=1)
            self._sums[2 + i] += (lost / power).sum().cpu()

    def result(self) -> Shape:
        """Raises:
        ValueError: no token that is not zero.
        """
        if not self._tokens:
            raise ValueError("no token but zeros")
        skew, kurtosis, *errors = (self._sums / self._tokens).tolist()
        edges, density = _density(self._counts)
        return Shape(
            tokens=self._tokens,
            values=int(self._counts.sum()),
            skew=skew,
            kurtosis=kurtosis,
            ks=_ks(self._counts),
            error=dict(zip(BITS, errors, strict=True)),
            edges=edges,
            density=density,
            quantiles=_quantiles(self._counts),
        )


def normal_error(bits: int, grid: Grid = "midrise", rule: ActivationRule = "gaussian") -> float:
    """The error of normally distributed tokens; none of ``x / sigma`` is distinguishable from them."""
    probabilities = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    token = torch.special.ndtri(probabilities)[None].float()
    lost = (token - fake_quantize_activation(token, bits, grid, rule)).square().sum()
    return float(lost / token.square().sum())


def _token_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1).clamp(min=_SMALLEST_SCALE)
    z = centred / variance.sqrt()[:, None]
    return z.pow(3).mean(dim=1), z.pow(4).mean(dim=1) - 3


def _histogram(z: Tensor) -> Tensor:
    """Counts of ``z`` in fine bins; what lies outside of them goes to the outermost."""
    index = ((z + _LIMIT) * _BINS_PER_SIGMA).floor().long().clamp(0, _BINS - 1)
    return torch.bincount(index.flatten(), minlength=_BINS)


def _edges() -> Tensor:
    return torch.arange(_BINS + 1, dtype=torch.float64) / _BINS_PER_SIGMA - _LIMIT


def _cumulative(counts: Tensor) -> Tensor:
    """Share of values below each edge, ``[bins + 1]``."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), counts.double().cumsum(0)]) / counts.sum()


def _ks(counts: Tensor) -> float:
    # The outermost edges stand for infinity, as their bins hold all that lies beyond.
    normal = torch.special.ndtr(_edges())
    return float((_cumulative(counts) - normal)[1:-1].abs().max())


def _density(counts: Tensor) -> tuple[list[float], list[float]]:
    """Coarse histogram in the middle of the range, as a density."""
    first, ratio = (_LIMIT - _PLOT_LIMIT) * _BINS_PER_SIGMA, _BINS_PER_SIGMA // _PLOT_BINS_PER_SIGMA
    coarse = counts[first:-first].reshape(-1, ratio).sum(dim=1).double()
    edges = torch.arange(len(coarse) + 1, dtype=torch.float64) / _PLOT_BINS_PER_SIGMA - _PLOT_LIMIT
    return edges.tolist(), (coarse / counts.sum() * _PLOT_BINS_PER_SIGMA).tolist()


def _quantiles(counts: Tensor) -> list[tuple[float, float]]:
    """Quantiles found, at even steps of the normal's, as far out as enough values lie beyond."""
    total = int(counts.sum())
    outermost = -float(torch.special.ndtri(torch.tensor(min(0.5, _FEWEST_BEYOND / total), dtype=torch.float64)))
    steps = math.floor(outermost / _QUANTILE_STEP)
    normal = torch.arange(-steps, steps + 1, dtype=torch.float64) * _QUANTILE_STEP
    below, edges = _cumulative(counts), _edges()
    wanted = torch.special.ndtr(normal)
    right = torch.searchsorted(below, wanted).clamp(1, _BINS)
    share = (wanted - below[right - 1]) / (below[right] - below[right - 1])
    found = edges[right - 1] + share / _BINS_PER_SIGMA
    return list(zip(normal.tolist(), found.tolist(), strict=True))


TOKENS_A_FORWARD = 256  # of each layer, picked anew by a fixed seed
IMAGES_A_FORWARD = 4  # of each attention, evenly spaced
_SMALLEST = 1e-30
_STREAM = 9  # of the random numbers that pick them


@dataclass(frozen=True)
class LayerInput:
    """How a layer treats its input of ``width`` values a token.

    ``weights``: made when called, ``[out, width]`` in the rotated basis: the part that sees quantised activations, and
    the whole weight, low-rank branch included.
    """

    width: int
    rotation: Rotation
    bits: int
    grid: Grid
    rule: ActivationRule
    weights: Weights


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
