"""How near to normal the input of every layer is, before and after its rotation, and what quantising costs there.

A model of the run sees the noised images of ``sensitivity``. A random part of each layer's input tokens is kept and
analysed at the end; heads are measured as they come.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn

from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears
from robuq_core.quant.activation import MAX_BITS, MIN_BITS, SIGMA_PER_MEAN_ABS, fake_quantize_activation
from robuq_core.quant.attention import quantized_attention
from train.data import step_generator
from train.evaluation.networks import EvaluationError
from train.logs import one_line, tracked
from train.parallel import training_device
from train.run import Run

BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
TOKENS = 256  # kept of each layer
_IMAGES = 4  # of each batch whose attention is measured
_STREAM = 9  # of the random numbers that pick tokens
_LIMIT, _BINS = 5, 100  # of the histogram, in sigma
_FEWEST_BEYOND = 5  # values beyond the outermost quantile shown


@dataclass(frozen=True)
class Shape:
    """Statistics of tokens ``[M, K]``.

    ``skew``, ``kurtosis`` (excess): of each token, averaged; 0 for a normal. ``ks``: greatest distance between the
    distribution of ``x / sigma`` and the standard normal's, with the quantiser's ``sigma = sqrt(pi/2) mean|x|`` of each
    token. ``error``: by bits, ``|x - Q_b(x)|^2 / |x|^2``, averaged. ``density``: of ``x / sigma`` in even bins from -5
    to 5. ``quantiles``: (normal's, found) pairs.
    """

    tokens: int
    skew: float
    kurtosis: float
    ks: float
    error: dict[int, float]
    density: list[float] = field(repr=False)
    quantiles: list[tuple[float, float]] = field(repr=False)


@dataclass(frozen=True)
class LayerDiagnosis:
    """``output_error``: ``|(x - Q(x)) W^T|^2 / |x W^T|^2`` at the layer's bits, of ``x`` quantised without the rotation
    and with it; ``W`` in the numerator is the ternary part of the weight, which sees quantised activations."""

    name: str
    width: int
    bits: int
    rotation_block: int | None
    before: Shape
    after: Shape
    output_error: tuple[float, float]

    @property
    def rotation_hurts(self) -> bool:
        return self.output_error[1] > self.output_error[0]


@dataclass(frozen=True)
class HeadDiagnosis:
    """``logit_sd``: standard deviation of a query's logits over the keys (root mean square over queries). ``error``:
    ``|quantised - exact| / |exact|`` of the output of 8-bit attention."""

    block: int
    head: int
    logit_sd: float
    error: float


@dataclass(frozen=True)
class Diagnosis:
    model: str
    layers: tuple[LayerDiagnosis, ...]
    heads: tuple[HeadDiagnosis, ...]


def shape_of(x: Tensor, layer: QuantLinear) -> Shape:
    """Statistics of ``x [M, K]``, no token all zeros, with the grid and the rule of ``layer``."""
    z = (x / (SIGMA_PER_MEAN_ABS * x.abs().mean(dim=1, keepdim=True))).double().numpy()
    power = x.double().square().sum(dim=1)
    lost = {bits: (x - _quantized(x, layer, bits)).double().square().sum(dim=1) for bits in BITS}
    counts, edges = np.histogram(z, _BINS, (-_LIMIT, _LIMIT))
    outermost = np.floor(-10 * stats.norm.ppf(min(0.5, _FEWEST_BEYOND / z.size))) / 10
    normal = np.linspace(-outermost, outermost, round(20 * outermost) + 1)
    return Shape(
        tokens=len(x),
        skew=float(stats.skew(z, axis=1).mean()),
        kurtosis=float(stats.kurtosis(z, axis=1).mean()),
        ks=float(stats.ks_1samp(z.ravel(), stats.norm.cdf, method="asymp").statistic),
        error={bits: float((each / power).mean()) for bits, each in lost.items()},
        density=(counts / z.size / (edges[1] - edges[0])).tolist(),
        quantiles=list(zip(normal.tolist(), np.quantile(z, stats.norm.cdf(normal)).tolist(), strict=True)),
    )


def _quantized(x: Tensor, layer: QuantLinear, bits: int) -> Tensor:
    return fake_quantize_activation(x, bits, layer.grid, layer.activation)


@torch.no_grad()
def diagnose_layer(name: str, layer: QuantLinear, tokens: Tensor) -> LayerDiagnosis:
    """What ``layer`` makes of its input ``tokens [M, K]``.

    Raises EvaluationError if all of them are zero.
    """
    x = tokens[tokens.any(dim=1)]
    if not len(x):
        raise EvaluationError(f"the input of {name} is always zero: train the model first")
    rotated, ternary = layer.rotation(x), layer.quantized()
    output = rotated @ (ternary + layer.lowrank_a @ layer.lowrank_b).T
    lost = (layer.rotation(x - _quantized(x, layer, layer.bits)), rotated - _quantized(rotated, layer, layer.bits))
    plain, with_rotation = (float((each @ ternary.T).square().sum() / output.square().sum()) for each in lost)
    return LayerDiagnosis(
        name=name,
        width=x.shape[1],
        bits=layer.bits,
        rotation_block=layer.rotation.block,
        before=shape_of(x, layer),
        after=shape_of(rotated, layer),
        output_error=(plain, with_rotation),
    )


@torch.no_grad()
def measure_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Sums by head, ``[3, heads]``, over images, queries and channels of ``qkv [B, L, 3 D]``: the variance of the
    logits (mean over queries), the square of the error of 8-bit attention, and that of its exact output."""
    heads = qkv.float().reshape(*qkv.shape[:2], 3, num_heads, -1)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    exact = logits.softmax(dim=-1) @ v
    lost = quantized_attention(q, k, v) - exact
    variance = logits.var(dim=-1, correction=0).mean(dim=-1)
    return torch.stack([variance.sum(0), *(x.square().sum(dim=(0, 2, 3)) for x in (lost, exact))]).double().cpu()


class Watch:
    """Keeps ``share`` random input tokens of every block linear, and the sums of every attention, at each forward."""

    def __init__(self, num_heads: int, share: int, seed: int) -> None:
        self.tokens: dict[str, list[Tensor]] = {}
        self._heads: dict[int, Tensor] = {}
        self._num_heads, self._share, self._seed, self._images = num_heads, share, seed, 0

    def see_input(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept, tokens = self.tokens.setdefault(name, []), inputs[0].flatten(0, -2)
        step = len(kept) * 1000 + len(self.tokens)
        chosen = torch.randperm(len(tokens), generator=step_generator(self._seed, step, stream=_STREAM))
        kept.append(tokens[chosen[: self._share].to(tokens.device)].float().cpu())

    def see_qkv(self, name: str, module: nn.Module, inputs: Any, qkv: Tensor) -> None:
        block = int(name.split(".")[1])
        self._images += block == 0 and len(qkv[:_IMAGES])
        self._heads[block] = self._heads.get(block, torch.zeros(())) + measure_heads(qkv[:_IMAGES], self._num_heads)

    def heads(self) -> Iterator[HeadDiagnosis]:
        for block, (variance, lost, exact) in sorted(self._heads.items()):
            sd, error = (variance / self._images).sqrt().tolist(), (lost / exact).sqrt().tolist()
            yield from (HeadDiagnosis(block, head, *pair) for head, pair in enumerate(zip(sd, error, strict=True)))


@contextmanager
def watched(model: DiT, watch: Watch) -> Iterator[None]:
    """While it lasts, ``watch`` sees every forward of ``model``."""
    linears = dict(quantizable_linears(model))
    handles = [linear.register_forward_pre_hook(partial(watch.see_input, name)) for name, linear in linears.items()]
    handles += [linear.register_forward_hook(partial(watch.see_qkv, name)) for name, linear in linears.items()
                if name.endswith(".qkv")]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def diagnose(run: Run, which: str | None = None) -> Diagnosis:
    """What the layers of the ``teacher`` or the ``student`` (default: the later that the run has) are given.

    The teacher's layers are taken as the student's would be before any training.

    Raises StateError or DataError if the model or the data cannot be read.
    """
    config, device = run.config, training_device()
    chosen = which or ("student" if run.path("qat").exists() else "teacher")
    if chosen not in ("teacher", "student"):
        raise EvaluationError(f"--model {chosen}: choose teacher or student (of a packed file: its student)")
    model = (run.student() if chosen == "student" else run.teacher()).eval()
    quantized = model if chosen == "student" else run.quantized(copy.deepcopy(model), config.quant)
    samples, size = config.sensitivity.samples, config.sensitivity.batch_size
    batches = run.fixed_points(samples, size, config.seed, device)
    watch = Watch(config.model.num_heads, -(-TOKENS // len(batches)), config.seed)
    with torch.no_grad(), watched(model.to(device), watch), tracked(batches, "watching layers") as seen:
        for batch in seen:
            model(batch.x_t, batch.timesteps, batch.classes)
    layers = {name: layer.cpu() for name, layer in quantizable_linears(quantized) if isinstance(layer, QuantLinear)}
    found = tuple(diagnose_layer(name, layer, torch.cat(watch.tokens[name])) for name, layer in layers.items())
    return Diagnosis(chosen, found, tuple(watch.heads()))


def report(found: Diagnosis, folder: Path) -> Path:
    """Print tables; write ``MODEL.json`` and, in ``MODEL/``, a picture of each layer to ``folder``. Returns the latter.

    Raises EvaluationError if they cannot be written.
    """
    pictures = folder / found.model
    try:
        with replacing(folder / f"{found.model}.json") as temporary:
            temporary.write_text(json.dumps(asdict(found)) + "\n")
        for layer in found.layers:
            with replacing(pictures / f"{layer.name}.png") as temporary:
                layer_plot(layer).savefig(temporary, format="png")
    except OSError as error:
        raise EvaluationError(
            f"{folder}: cannot be written ({one_line(error)}); free some space and run again"
        ) from error
    hurt = [layer.name for layer in found.layers if layer.rotation_hurts]
    nearer = sum(layer.after.ks < layer.before.ks for layer in found.layers)
    Console().print(
        layer_table(found),
        head_table(found),
        f"rotation brings {nearer} of {len(found.layers)} layers nearer to the normal, and raises the output error of "
        f"{len(hurt)}{': ' if hurt else ''}{', '.join(hurt)}",
        f"wrote {pictures}",
        sep="\n",
    )
    return pictures


def layer_table(found: Diagnosis) -> Table:
    table = Table("layer", "bits", "distance to the normal", "input error", "output error", "",
                  title="without rotation -> with it")  # fmt: skip
    for layer in found.layers:
        errors = (layer.before.error[layer.bits], layer.after.error[layer.bits])
        pairs = ((layer.before.ks, layer.after.ks), errors, layer.output_error)
        cells = [f"{before:.4f} -> {after:.4f}" for before, after in pairs]
        table.add_row(layer.name, str(layer.bits), *cells, "rotation hurts" if layer.rotation_hurts else "")
    return table


def head_table(found: Diagnosis) -> Table:
    blocks: dict[int, list[str]] = {}
    for head in found.heads:
        blocks.setdefault(head.block, []).append(f"{head.logit_sd:.3g}, {head.error:.1%}")
    columns = map(str, range(max(map(len, blocks.values()), default=0)))
    table = Table("block", *columns, title="heads: sd of the logits, error of 8-bit attention")
    for block, cells in blocks.items():
        table.add_row(str(block), *cells)
    return table


def layer_plot(layer: LayerDiagnosis) -> Figure:
    """Histogram, Q-Q plot and error by bits, before the rotation and after it; dashed: of the normal."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    rotation = {None: "whole", 1: "none"}.get(layer.rotation_block, f"blocks of {layer.rotation_block}")
    figure.suptitle(f"{layer.name}: {layer.width} values a token, {layer.before.tokens:,} tokens, rotation {rotation}, "
                    f"{layer.bits} bits; excess kurtosis {layer.before.kurtosis:.2f} -> {layer.after.kurtosis:.2f}",
                    fontsize="medium")  # fmt: skip
    histogram, quantiles, errors = figure.subplots(1, 3)
    edges = np.linspace(-_LIMIT, _LIMIT, _BINS + 1)
    for shape, colour, label in ((layer.before, "C1", "before"), (layer.after, "C0", "after rotation")):
        histogram.stairs(shape.density, edges, color=colour, label=label)
        quantiles.plot(*zip(*shape.quantiles, strict=True), color=colour)
        errors.plot(BITS, list(shape.error.values()), color=colour, marker="o", markersize=3)
    histogram.plot(edges, stats.norm.pdf(edges), "k--", label="normal")
    histogram.set(title="Distribution", xlabel="x / sigma of its token", ylabel="density", yscale="log")
    histogram.set_ylim(bottom=1e-5)
    histogram.legend(fontsize=8)
    quantiles.plot((-_LIMIT, _LIMIT), (-_LIMIT, _LIMIT), "k--")
    quantiles.set(title="Q-Q against the normal", xlabel="quantile of the normal", ylabel="quantile of x / sigma",
                  ylim=(-8, 8))  # fmt: skip
    errors.axvline(layer.bits, color="grey", linewidth=0.8)
    errors.set(title="Quantisation error", xlabel="bits", ylabel="|x - Q(x)|² / |x|²", yscale="log", xticks=BITS)
    return figure
