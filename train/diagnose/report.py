"""A diagnosis for readers: one HTML file with its plots, without scripts or anything from outside, and tables."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from rich.table import Table

from robuq_core.quant.choices import ActivationRule, Grid
from train.diagnose.watch import BITS, Diagnosis, LayerDiagnosis, Shape, normal_error

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


_CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --faint: #59636e; --grid: #d0d7de; --link: #0757ba;
  --before: #b35900; --after: #0a6dc2; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e6e9ed; --faint: #a3acb7; --grid: #3a424c;
  --link: #7fb8ff; --before: #f0a04b; --after: #66b2ff; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
a { color: var(--link); } a:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--link); }
h1 { margin-bottom: .2em; } h2 { margin-top: 2em; } .faint { color: var(--faint); }
.before { color: var(--before); } .after { color: var(--after); font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; padding-bottom: .4rem; }
section { border-top: 1px solid var(--grid); margin-top: 2rem; content-visibility: auto;
  contain-intrinsic-size: 30rem; }
svg { width: 100%; min-width: 44rem; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; background: var(--ground); padding: .5rem; }
@media print { section { break-inside: avoid; content-visibility: visible; } }
"""


def html_report(found: Diagnosis) -> str:
    """The whole page."""
    layers = found.layers
    title = f"Activations of {html.escape(found.model)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_CSS}</style></head>
<body>
<a class="skip" href="#layers">Skip to the layers</a>
<h1>{title}</h1>
<p class="faint">Inputs of {len(layers)} layers on {html.escape(found.source)}; {_thousands(layers[0].before.tokens)} to
{_thousands(max(layer.before.tokens for layer in layers))} tokens a layer. Quantiser: {html.escape(found.rule)},
{html.escape(found.grid)}.</p>
<main>
<h2>In short</h2>
{_verdict(layers, found)}
{_by_type(layers)}
{_heads(found)}
<h2>How to read it</h2>
{_legend(found)}
<h2 id="layers">Layers</h2>
{_overview(layers)}
{"".join(_section(layer, found) for layer in layers)}
</main>
</body>
</html>
"""


def _verdict(layers: Sequence[LayerDiagnosis], found: Diagnosis) -> str:
    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    nearer = sum(layer.after.ks < layer.before.ks for layer in layers)
    better = sum(layer.after.error[layer.bits] < layer.before.error[layer.bits] for layer in layers)
    worst = max(layers, key=lambda layer: layer.after.ks)
    kurtosis = [middle(getattr(layer, side).kurtosis for layer in layers) for side in ("before", "after")]
    distance = [middle(getattr(layer, side).ks for layer in layers) for side in ("before", "after")]
    return f"""<ul>
<li>Median excess kurtosis: {_change(kurtosis[0], kurtosis[1], 2)} (a normal has 0); median distance to the
normal: {_change(distance[0], distance[1], 3)}.</li>
<li>Rotation brings {nearer} of {len(layers)} layers nearer to the normal, and lowers the quantisation error at the
layer's own width in {better}.</li>
<li>Rotation raises the error of the output in {_hurt(layers)}.</li>
<li>Furthest from the normal after rotation: <a href="#{_anchor(worst)}">{html.escape(worst.name)}</a>
({worst.after.ks:.3f}).</li>
</ul>"""


def _hurt(layers: Sequence[LayerDiagnosis]) -> str:
    links = [f'<a href="#{_anchor(layer)}">{html.escape(layer.name)}</a>' for layer in layers if layer.rotation_hurts]
    return f"{len(links)} of {len(layers)} layers{': ' if links else ''}{', '.join(links)}"


def _heads(found: Diagnosis) -> str:
    count = max((head.head for head in found.heads), default=-1) + 1
    rows = []
    for block in sorted({head.block for head in found.heads}):
        cells = [f"{head.logit_sd:.3g}, {head.error:.2%}" for head in found.heads if head.block == block]
        rows.append(_row(f"block {block}", *cells))
    caption = "Heads: standard deviation of the logits, error that 8-bit attention makes in the output"
    return _table(caption, ["", *map(str, range(count))], rows)


def _by_type(layers: Sequence[LayerDiagnosis]) -> str:
    kinds: dict[str, list[LayerDiagnosis]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.split(".", 2)[2].removeprefix("attn.").removeprefix("mlp."), []).append(layer)
    rows = []
    for kind, members in kinds.items():
        cells = [
            _change(statistics.fmean(of(layer, "before") for layer in members),
                    statistics.fmean(of(layer, "after") for layer in members), digits)
            for of, digits in _COLUMNS
        ]  # fmt: skip
        rows.append(_row(html.escape(kind), str(len(members)), *cells))
    return _table("Means by kind of layer", ["kind", "layers", *_HEADINGS], rows)


def _kurtosis(layer: LayerDiagnosis, side: str) -> float:
    return _shape(layer, side).kurtosis


def _skew(layer: LayerDiagnosis, side: str) -> float:
    return _shape(layer, side).skew


def _ks(layer: LayerDiagnosis, side: str) -> float:
    return _shape(layer, side).ks


def _own_error(layer: LayerDiagnosis, side: str) -> float:
    return _shape(layer, side).error[layer.bits]


def _output_error(layer: LayerDiagnosis, side: str) -> float:
    return layer.output_error[0 if side == "before" else 1]


def _shape(layer: LayerDiagnosis, side: str) -> Shape:
    return layer.before if side == "before" else layer.after


_COLUMNS = ((_kurtosis, 2), (_skew, 2), (_ks, 3), (_own_error, 4), (_output_error, 4))
_HEADINGS = ["excess kurtosis", "skew", "distance to the normal", "error at its bits", "error of the output"]


def _legend(found: Diagnosis) -> str:
    expected = ", ".join(f"{bits}: {normal_error(bits, found.grid, found.rule):.5f}" for bits in BITS)
    return f"""<p>Each figure reads <span class="before">before</span> → <span class="after">after</span> the layer's
rotation. Kurtosis and skew are those of single tokens, averaged. The distance is Kolmogorov and Smirnov's, of
<i>x</i>/sigma to the standard normal, with the sigma that the quantiser takes from each token,
sqrt(π/2)·mean|<i>x</i>|: its fixed steps are the best ones for that normal. The error is
|<i>x</i> − Q(<i>x</i>)|²/|<i>x</i>|², averaged over
tokens; that of the output is
|(<i>x</i> − Q(<i>x</i>))<i>W</i><sup>T</sup>|²/|<i>x</i><i>W</i><sup>T</sup>|², the one that counts: rotation spreads
an outlier's error over all channels, and hurts where the outlier's own weights are small. In the pictures the dashed
line is the normal. Of a normal, the error by bits is
{expected}.</p>"""


def _overview(layers: Sequence[LayerDiagnosis]) -> str:
    rows = []
    for layer in layers:
        cells = [_change(of(layer, "before"), of(layer, "after"), digits) for of, digits in _COLUMNS]
        link = f'<a href="#{_anchor(layer)}">{html.escape(layer.name)}</a>'
        rows.append(_row(link, str(layer.width), str(layer.bits), _rotation(layer), *cells))
    return _table("All layers", ["layer", "width", "bits", "rotation", *_HEADINGS], rows)


def _section(layer: LayerDiagnosis, found: Diagnosis) -> str:
    errors = [_row("before", *(f"{layer.before.error[bits]:.5f}" for bits in BITS)),
              _row("after", *(f"{layer.after.error[bits]:.5f}" for bits in BITS))]  # fmt: skip
    plot = layer_plot(layer, found.rule, found.grid)
    return f"""<section id="{_anchor(layer)}">
<h3>{html.escape(layer.name)}</h3>
<p>Excess kurtosis {_change(layer.before.kurtosis, layer.after.kurtosis, 2)}, skew
{_change(layer.before.skew, layer.after.skew, 2)}, distance to the normal {_change(layer.before.ks, layer.after.ks, 3)};
{layer.width} values a token, {_thousands(layer.before.tokens)} tokens, rotation {_rotation(layer)},
{layer.bits} bits. <a href="#layers">All layers</a></p>
<div class="scroll" tabindex="0" role="region" aria-label="Pictures of {html.escape(layer.name)}">{plot}</div>
{_table("Quantisation error by bits", ["", *map(str, BITS)], errors)}
</section>
"""


def _table(caption: str, headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>
<caption>{caption}</caption>
<thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>"""


def _row(first: str, *cells: str) -> str:
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def _change(before: float, after: float, digits: int) -> str:
    # Nought point nothing has no sign.
    first, second = (f"{round(each, digits) + 0.0:.{digits}f}" for each in (before, after))
    return f'<span class="before">{first}</span> → <span class="after">{second}</span>'


def _rotation(layer: LayerDiagnosis) -> str:
    return {None: "whole", 1: "none"}.get(layer.rotation_block, f"blocks of {layer.rotation_block}")


def _anchor(layer: LayerDiagnosis) -> str:
    return "layer-" + layer.name.replace(".", "-")


def _thousands(count: int) -> str:
    return f"{count:,}"


def layer_table(found: Diagnosis) -> Table:
    """Errors of every layer at its own width, without its rotation and with it."""
    table = Table("layer", "bits", "input error", "output error", "", title="without rotation -> with it")
    for layer in found.layers:
        inputs = (layer.before.error[layer.bits], layer.after.error[layer.bits])
        cells = [f"{before:.4f} -> {after:.4f}" for before, after in (inputs, layer.output_error)]
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


def rotation_verdict(found: Diagnosis) -> str:
    """One line."""
    hurt = [layer.name for layer in found.layers if layer.rotation_hurts]
    names = f": {', '.join(hurt)}" if hurt else ""
    return f"rotation raises the output error of {len(hurt)} of {len(found.layers)} layers{names}"
