"""The pictures of a report, as SVG that takes its colours from the page: light or dark."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from robuq_core.quant.choices import ActivationRule, Grid
from train.diagnose.shape import BITS, normal_error
from train.diagnose.watch import LayerDiagnosis

# Stand-ins that matplotlib takes; the page's style sheet says what they are.
_INK, _GRID, _BEFORE, _AFTER = "#010101", "#020202", "#030303", "#040404"
_NAMES = {_INK: "ink", _GRID: "grid", _BEFORE: "before", _AFTER: "after"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robuq",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
}
_IDENTIFIER = re.compile(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"')
_SHOWN_QUANTILES = 8.0


def layer_plot(layer: LayerDiagnosis, rule: ActivationRule, grid: Grid) -> str:
    """Histogram, Q-Q plot and error by bits of ``layer``, side by side: one ``<svg>`` element."""
    with matplotlib.rc_context(_STYLE):
        figure, (histogram, quantiles, errors) = plt.subplots(1, 3, figsize=(11, 3.3))
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.16, top=0.91, wspace=0.24)
        try:
            _histogram(histogram, layer)
            _quantiles(quantiles, layer)
            _errors(errors, layer, rule, grid)
            for axes in (histogram, errors):
                axes.yaxis.set_minor_locator(NullLocator())
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        finally:
            plt.close(figure)
    return _embeddable(stream.getvalue(), f"{layer.name}: histogram, Q-Q plot and quantisation error by bits")


def _histogram(axes: Axes, layer: LayerDiagnosis) -> None:
    edges = layer.before.edges
    normal = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in edges]
    axes.stairs(layer.before.density, edges, color=_BEFORE, label="before")
    axes.stairs(layer.after.density, edges, color=_AFTER, linewidth=1.6, label="after rotation")
    axes.plot(edges, normal, color=_INK, linewidth=0.8, linestyle="--", label="normal")
    axes.set_yscale("log")
    axes.set_ylim(1e-5, 10 ** math.ceil(math.log10(max(*layer.before.density, *layer.after.density, 0.5))))
    axes.set(title="Distribution", xlabel="x / sigma of its token", ylabel="density")
    axes.legend(frameon=False, fontsize=8)


def _quantiles(axes: Axes, layer: LayerDiagnosis) -> None:
    ends = [-5.0, 5.0]
    axes.plot(ends, ends, color=_INK, linewidth=0.8, linestyle="--")
    for shape, colour, width in ((layer.before, _BEFORE, 1.0), (layer.after, _AFTER, 1.6)):
        normal, found = zip(*shape.quantiles, strict=True)
        axes.plot(normal, found, color=colour, linewidth=width)
    axes.set_ylim(-_SHOWN_QUANTILES, _SHOWN_QUANTILES)
    axes.set_xlim(*ends)
    axes.grid(visible=True)
    axes.set(title="Q-Q against the normal", xlabel="quantile of the normal", ylabel="quantile of x / sigma")


def _errors(axes: Axes, layer: LayerDiagnosis, rule: ActivationRule, grid: Grid) -> None:
    normal = [normal_error(bits, grid, rule) for bits in BITS]
    axes.plot(BITS, list(layer.before.error.values()), color=_BEFORE, marker="o", markersize=3)
    axes.plot(BITS, list(layer.after.error.values()), color=_AFTER, marker="o", markersize=3, linewidth=1.6)
    axes.plot(BITS, normal, color=_INK, linewidth=0.8, linestyle="--")
    axes.axvline(layer.bits, color=_GRID, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(list(BITS))
    axes.grid(visible=True, axis="y")
    axes.set(title="Quantisation error", xlabel="bits", ylabel="|x - Q(x)|² / |x|²")


def _embeddable(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _IDENTIFIER.sub("", svg)  # a page must not have one twice
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
