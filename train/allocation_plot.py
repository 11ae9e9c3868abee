"""The widths that each method gives, drawn: one panel a method, one column a block, one row a layer type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from robuq_core.files import replacing
from train.allocate import LAYER_TYPES, Allocation, layer_type


def plot_allocations(allocations: Sequence[Allocation], path: Path) -> None:
    """Write a picture whose format is that of the suffix of ``path`` (png, svg or pdf)."""
    grids = {each.method: _grid(each) for each in allocations}
    blocks = max(grid.shape[1] for grid in grids.values())
    figure = Figure(figsize=(max(6.0, 0.4 * blocks + 2), 1.6 * len(grids) + 0.6), layout="constrained")
    top = max(max(each.bits.values()) for each in allocations)
    for i, each in enumerate(allocations):
        grid = grids[each.method]
        axes = figure.add_subplot(len(allocations), 1, i + 1)
        axes.imshow(grid, cmap="viridis", vmin=1, vmax=top, aspect="auto")
        title = f"{each.method.replace('_', ' ')}: {each.average_bits:.3f} bits, predicted {each.predicted_loss:+.3g}"
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(LAYER_TYPES)), LAYER_TYPES)
        axes.set_xticks(range(grid.shape[1]))
        for (row, column), width in np.ndenumerate(grid):
            dark = width < (1 + top) / 2
            axes.text(column, row, f"{width:.0f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xlabel("block")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def _grid(allocation: Allocation) -> np.ndarray:
    """Widths ``[types, blocks]``; not a number where a block lacks a type."""
    names = {name: int(name.split(".")[1]) for name in allocation.bits}
    grid = np.full((len(LAYER_TYPES), max(names.values()) + 1), np.nan)
    for name, block in names.items():
        grid[LAYER_TYPES.index(layer_type(name)), block] = allocation.bits[name]
    return grid
