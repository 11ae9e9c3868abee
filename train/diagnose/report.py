"""A diagnosis for readers: two tables and a verdict on the screen, every figure as JSON, a page of plots per layer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from robuq_core.files import replacing
from train.diagnose.watch import BITS, Diagnosis, LayerDiagnosis, normal_error
from train.evaluation.networks import EvaluationError
from train.logs import one_line

_QUANTILES_TO = 8.0
_BEFORE, _AFTER = "C1", "C0"


def report(found: Diagnosis, folder: Path) -> Path:
    """Print ``found`` and write ``MODEL.json`` and ``MODEL.pdf`` to ``folder``; returns the latter.

    Raises:
        EvaluationError: they cannot be written.
    """
    path = folder / f"{found.model}.pdf"
    try:
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(asdict(found)) + "\n")
        with replacing(path) as temporary, PdfPages(temporary, metadata={"Title": found.source}) as pages:
            for layer in found.layers:
                pages.savefig(layer_plot(layer, found))
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({one_line(error)}); free some space and run again"
        ) from error
    console = Console()
    console.print(layer_table(found), head_table(found), verdict(found), f"wrote {path}", sep="\n")
    return path


def layer_table(found: Diagnosis) -> Table:
    """Of every layer: distance to the normal and errors at its own width, without its rotation and with it."""
    table = Table("layer", "bits", "distance to the normal", "input error", "output error", "",
                  title="without rotation -> with it")  # fmt: skip
    for layer in found.layers:
        errors = (layer.before.error[layer.bits], layer.after.error[layer.bits])
        pairs = ((layer.before.ks, layer.after.ks), errors, layer.output_error)
        cells = [f"{before:.4f} -> {after:.4f}" for before, after in pairs]
        table.add_row(layer.name, str(layer.bits), *cells, "rotation hurts" if layer.rotation_hurts else "")
    return table


def head_table(found: Diagnosis) -> Table:
    """Standard deviation of each head's logits and the relative error that 8-bit attention makes in its output."""
    count = max((head.head for head in found.heads), default=-1) + 1
    table = Table("block", *map(str, range(count)), title="heads: sd of the logits, error of 8-bit attention")
    for block in sorted({head.block for head in found.heads}):
        heads = [head for head in found.heads if head.block == block]
        table.add_row(str(block), *(f"{head.logit_sd:.3g}, {head.error:.1%}" for head in heads))
    return table


def verdict(found: Diagnosis) -> str:
    hurt = [layer.name for layer in found.layers if layer.rotation_hurts]
    nearer = sum(layer.after.ks < layer.before.ks for layer in found.layers)
    names = f": {', '.join(hurt)}" if hurt else ""
    return (f"rotation brings {nearer} of {len(found.layers)} layers nearer to the normal, and raises the output error "
            f"of {len(hurt)}{names}")  # fmt: skip


def layer_plot(layer: LayerDiagnosis, found: Diagnosis) -> Figure:
    """Histogram, Q-Q plot and error by bits, before the rotation and after it; dashed: of the normal."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    rotation = {None: "whole", 1: "none"}.get(layer.rotation_block, f"blocks of {layer.rotation_block}")
    figure.suptitle(f"{layer.name}: {layer.width} values a token, {layer.before.tokens:,} tokens, rotation {rotation}, "
                    f"{layer.bits} bits; excess kurtosis {layer.before.kurtosis:.2f} -> {layer.after.kurtosis:.2f}",
                    fontsize="medium")  # fmt: skip
    histogram, quantiles, errors = figure.subplots(1, 3)
    _histogram(histogram, layer)
    _quantiles(quantiles, layer)
    _errors(errors, layer, [normal_error(bits, found.grid, found.rule) for bits in BITS])
    return figure


def _histogram(axes: Axes, layer: LayerDiagnosis) -> None:
    edges = layer.before.edges
    axes.stairs(layer.before.density, edges, color=_BEFORE, label="before")
    axes.stairs(layer.after.density, edges, color=_AFTER, linewidth=1.6, label="after rotation")
    axes.plot(edges, [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in edges], "k--", label="normal")
    axes.set(title="Distribution", xlabel="x / sigma of its token", ylabel="density", yscale="log")
    axes.set_ylim(1e-5, 10 ** math.ceil(math.log10(max(*layer.before.density, *layer.after.density, 0.5))))
    axes.legend(fontsize=8)


def _quantiles(axes: Axes, layer: LayerDiagnosis) -> None:
    ends = (-5.0, 5.0)
    axes.plot(ends, ends, "k--")
    for shape, colour in ((layer.before, _BEFORE), (layer.after, _AFTER)):
        axes.plot(*zip(*shape.quantiles, strict=True), color=colour)
    axes.set(title="Q-Q against the normal", xlabel="quantile of the normal", ylabel="quantile of x / sigma",
             xlim=ends, ylim=(-_QUANTILES_TO, _QUANTILES_TO))  # fmt: skip


def _errors(axes: Axes, layer: LayerDiagnosis, normal: list[float]) -> None:
    for shape, colour in ((layer.before, _BEFORE), (layer.after, _AFTER)):
        axes.plot(BITS, list(shape.error.values()), color=colour, marker="o", markersize=3)
    axes.plot(BITS, normal, "k--")
    axes.axvline(layer.bits, color="grey", linewidth=0.8)
    axes.set(title="Quantisation error", xlabel="bits", ylabel="|x - Q(x)|² / |x|²", yscale="log", xticks=BITS)
