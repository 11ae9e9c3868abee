"""The pictures of a study: distance by row and width, and samples of every row."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from robuq_core.files import replacing
from train.ablations.config import RunSpec
from train.ablations.findings import METRIC, cells, distances
from train.ablations.intervals import mean_interval
from train.ablations.runs import strip_path
from train.ablations.study import Study

_DPI, _ZOOM, _GAP = 100, 1.5, 2
_LABEL_INCHES = 4.0


def plot_ladder(study: Study, path: Path) -> None:
    """Distance (logarithmic) by row of the ladder, one line a width, every seed a dot; SVG."""
    config = study.config
    names = [row.name for row in config.ladder]
    found = list(cells(study, config.ladder))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for width in config.widths:
        column = {cell.row: [d for d in cell.distances if d is not None] for cell in found if cell.width == width}
        points = [(names.index(name), values) for name, values in column.items() if values]
        (line,) = axes.plot([x for x, _ in points], [mean_interval(values).value for _, values in points],
                            marker="o", label=f"A{width}")  # fmt: skip
        for x, values in points:
            axes.plot([x] * len(values), values, ".", color=line.get_color(), alpha=0.5)
    full = [each for each in distances(study.results(None, 0)) if each is not None]
    if full:
        axes.axhline(mean_interval(full).value, color="grey", linestyle="--", label="full precision")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=15, ha="right")
    axes.set_ylabel(f"{METRIC} (lower is better)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    # Without a date and with fixed ids, the same results give the same file.
    with replacing(path) as temporary, mpl.rc_context({"svg.hashsalt": "robuq"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def plot_samples(study: Study, path: Path) -> None:
    """The first samples of the first seed, one strip a row and width, the same noise in each column; PNG."""
    seed = study.config.seeds[0]
    specs: list[tuple[str, RunSpec | None]] = [("full precision", study.full_precision(seed))]
    for row in study.config.rows:
        for width in study.config.row_widths(row):
            specs.append((f"{row.name}, A{width}", study.row_spec(row, width, seed)))
    strips = [(name, strip_path(study.place, spec)) for name, spec in specs if spec is not None]
    strips = [(name, strip) for name, strip in strips if strip.exists()]
    if not strips:
        return
    images = [np.asarray(Image.open(strip, formats=("PNG",))) for _, strip in strips]
    height, width = images[0].shape
    gap = np.full((_GAP, width), 255, dtype=np.uint8)
    sheet = np.concatenate([part for image in images for part in (image, gap)])
    figure = Figure(figsize=(_LABEL_INCHES + width * _ZOOM / _DPI, len(sheet) * _ZOOM / _DPI))
    label = _LABEL_INCHES / figure.get_figwidth()
    axes = figure.add_axes((label, 0, 1 - label, 1))
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([i * (height + _GAP) + height / 2 for i in range(len(strips))], [name for name, _ in strips])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
