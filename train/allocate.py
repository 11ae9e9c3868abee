"""Which activation width each layer gets, eq. (6): exact integer programming under a MAC-weighted budget.

Also the two that it is compared with: greedy by gain per MAC, and one width everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.quant.bits import average_bits

Method = Literal["dynamic_programming", "greedy", "uniform"]
METHODS: tuple[Method, ...] = get_args(Method)

# Losses by layer and width: what the model loses with that layer at that width.
Losses = Mapping[str, Mapping[int, float]]

LAYER_TYPES = ("proj", "qkv", "fc1", "fc2")

# Mean width by layer type that the paper's search found for DiT-XL/2, by budget.
PAPER_AVERAGES = {2: {"proj": 2.75, "qkv": 2.21, "fc1": 2.00, "fc2": 1.64},
                  3: {"proj": 3.89, "qkv": 2.96, "fc1": 3.04, "fc2": 2.31}}  # fmt: skip


class AllocationError(UserError):
    """A budget that no choice of widths meets."""


@dataclass(frozen=True)
class Allocation:
    """``bits`` by layer; ``average_bits``: their MAC-weighted mean, at most ``budget_bits``.

    ``predicted_loss``: the sum of the chosen entries of the sensitivity table.
    """

    method: Method
    budget_bits: float
    average_bits: float
    predicted_loss: float
    bits: dict[str, int]


def allocate(
    losses: Losses, macs: Mapping[str, int], budget_bits: float, method: Method = "dynamic_programming"
) -> Allocation:
    """Choose one width a layer: ``min sum_l s_l(b_l)`` subject to ``sum_l MAC_l b_l <= budget_bits sum_l MAC_l``.

    ``losses``: s_l(b), any real numbers; every layer has at least one width. ``macs``: positive. Raises AllocationError
    if the smallest widths together are above the budget.
    """
    names = list(losses)
    common = math.gcd(*(macs[name] for name in names))
    costs = [macs[name] // common for name in names]
    # The decimal that was written, not its binary neighbour: 2.1 must admit what averages to exactly 2.1.
    budget = math.floor(Fraction(str(budget_bits)) * sum(costs))
    options = [sorted(losses[name].items()) for name in names]
    least = sum(cost * widths[0][0] for cost, widths in zip(costs, options, strict=True))
    if least > budget:
        raise AllocationError(f"allocate.average_bits {budget_bits} is below {least / sum(costs):.3g}, the average of "
                              "the smallest widths in sensitivity.bits: raise it or measure smaller ones")  # fmt: skip
    search = {"dynamic_programming": _dynamic_programming, "greedy": _greedy, "uniform": _uniform}[method]
    bits = dict(zip(names, search(options, costs, budget), strict=True))
    predicted = math.fsum(losses[name][width] for name, width in bits.items())
    return Allocation(method, float(budget_bits), average_bits(bits, macs), predicted, bits)


@dataclass(frozen=True)
class Resampled:
    """What an allocation owes to the points that it was measured on: ``resamples`` bootstrap draws of their batches.

    ``bits``: 2.5% and 97.5% quantiles of each layer's width when the search is repeated on each draw. ``kept``: share
    of the draws that give the layer its chosen width. ``gain``: what the chosen widths save over one width everywhere,
    on each draw: 2.5%, 50% and 97.5% quantiles, or None if no uniform width fits the budget.
    """

    resamples: int
    batches: int
    bits: dict[str, tuple[int, int]]
    kept: dict[str, float]
    gain: tuple[float, float, float] | None

    @property
    def summary(self) -> str:
        """One line."""
        kept = sum(self.kept.values()) / len(self.kept)
        text = f"{self.resamples} resamples of {self.batches} batches keep {kept:.0%} of the widths"
        if self.gain is None:
            return text
        low, middle, high = self.gain
        return f"{text}; gain over one width everywhere {middle:.3g}, 95% interval {low:.3g} to {high:.3g}"


def resample(
    by_batch: Mapping[str, Mapping[int, Sequence[float]]],
    sizes: Sequence[int],
    macs: Mapping[str, int],
    chosen: Allocation,
    resamples: int = 200,
    seed: int = 0,
) -> Resampled:
    """Bootstrap ``chosen`` over the batches that its losses are means of.

    ``by_batch``: losses by layer, width and batch. ``sizes``: points of each batch. ``macs``: as of :func:`allocate`.
    """
    generator = np.random.default_rng(seed)
    names, points = list(by_batch), np.array(sizes, dtype=np.float64)
    values = {name: {width: np.array(row) for width, row in by_batch[name].items()} for name in names}
    try:
        mean = {name: {w: float(row @ points) for w, row in widths.items()} for name, widths in values.items()}
        uniform = allocate(mean, macs, chosen.budget_bits, "uniform").bits
    except AllocationError:
        uniform = None
    widths: dict[str, list[int]] = {name: [] for name in names}
    gains = []
    for _ in range(resamples):
        weights = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes))) * points
        weights = weights / weights.sum()
        losses = {name: {width: float(row @ weights) for width, row in values[name].items()} for name in names}
        for name, width in allocate(losses, macs, chosen.budget_bits, chosen.method).bits.items():
            widths[name].append(width)
        if uniform is not None:
            gains.append(math.fsum(losses[name][uniform[name]] - losses[name][chosen.bits[name]] for name in names))
    ends = {name: np.quantile(found, (0.025, 0.975), method="nearest") for name, found in widths.items()}
    low, middle, high = np.quantile(gains, (0.025, 0.5, 0.975)).tolist() if gains else (0.0, 0.0, 0.0)
    return Resampled(
        resamples=resamples,
        batches=len(sizes),
        bits={name: (int(each[0]), int(each[1])) for name, each in ends.items()},
        kept={name: found.count(chosen.bits[name]) / resamples for name, found in widths.items()},
        gain=(low, middle, high) if gains else None,
    )


Options = Sequence[Sequence[tuple[int, float]]]


def _dynamic_programming(options: Options, costs: Sequence[int], budget: int) -> list[int]:
    """Layer by layer, the least loss for every total cost up to the budget; then the choices, read backwards."""
    best = np.zeros(budget + 1)
    choices = []
    for widths, cost in zip(options, costs, strict=True):
        candidates = np.full((len(widths), budget + 1), np.inf)
        for i, (width, loss) in enumerate(widths):
            spent = cost * width
            if spent <= budget:
                candidates[i, spent:] = best[: budget + 1 - spent] + loss
        choices.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    found, left = [], budget
    for widths, cost, choice in zip(reversed(options), reversed(costs), reversed(choices), strict=True):
        width = widths[int(choice[left])][0]
        found.append(width)
        left -= cost * width
    return found[::-1]


def _greedy(options: Options, costs: Sequence[int], budget: int) -> list[int]:
    """From the smallest widths, again and again the step up that gains most per unit of cost and still fits."""
    chosen = [0] * len(options)
    left = budget - sum(cost * widths[0][0] for cost, widths in zip(costs, options, strict=True))
    while True:
        best_rate, best_step = 0.0, None
        for layer, (widths, cost) in enumerate(zip(options, costs, strict=True)):
            width, loss = widths[chosen[layer]]
            for i in range(chosen[layer] + 1, len(widths)):
                extra = cost * (widths[i][0] - width)
                rate = (loss - widths[i][1]) / extra
                if extra <= left and rate > best_rate:
                    best_rate, best_step = rate, (layer, i, extra)
        if best_step is None:
            return [widths[i][0] for widths, i in zip(options, chosen, strict=True)]
        layer, chosen[layer], extra = best_step
        left -= extra


def _uniform(options: Options, costs: Sequence[int], budget: int) -> list[int]:
    """The largest width that every layer has and that fits."""
    common = set.intersection(*({width for width, _ in widths} for widths in options))
    fitting = [width for width in common if width * sum(costs) <= budget]
    if not fitting:
        raise AllocationError(f"allocate.method uniform: no width that every layer was measured at fits "
                              f"allocate.average_bits {budget / sum(costs):.3g}")  # fmt: skip
    return [max(fitting)] * len(options)


def averages_by_type(bits: Mapping[str, int]) -> dict[str, float]:
    """Mean width of the layers of each of :data:`LAYER_TYPES` (over layers, as the paper counts)."""
    groups: dict[str, list[int]] = {}
    for name, width in bits.items():
        groups.setdefault(name.rpartition(".")[2], []).append(width)
    return {kind: sum(group) / len(group) for kind, group in groups.items()}


def type_table(allocations: Sequence[Allocation]) -> Table:
    """Mean width by layer type, one row an allocation, with the paper's beside where it has the same budget."""
    table = Table("method", *LAYER_TYPES, "average", "predicted loss", title="activation bits by layer type")
    for each in allocations:
        means = averages_by_type(each.bits)
        table.add_row(each.method.replace("_", " "), *(f"{means.get(kind, math.nan):.2f}" for kind in LAYER_TYPES),
                      f"{each.average_bits:.3f}", f"{each.predicted_loss:.4g}")  # fmt: skip
    for budget, means in PAPER_AVERAGES.items():
        if any(each.budget_bits == budget for each in allocations):
            table.add_row(f"paper, DiT-XL/2, A{budget}", *(f"{means[kind]:.2f}" for kind in LAYER_TYPES), "", "")
    return table


def layer_table(allocations: Sequence[Allocation], interval: Resampled) -> Table:
    """The width of every layer, one column an allocation; ``interval``: of the first one."""
    methods = (each.method.replace("_", " ") for each in allocations)
    table = Table("layer", *methods, "95% interval", "kept", title="activation bits by layer")
    for name in allocations[0].bits:
        low, high = interval.bits[name]
        between = str(low) if low == high else f"{low}..{high}"
        table.add_row(name, *(str(each.bits[name]) for each in allocations), between, f"{interval.kept[name]:.0%}")
    return table


def plot_allocations(allocations: Sequence[Allocation], path: Path) -> None:
    """Draw the widths that each method gives as PNG: a panel per method, a column per block, a row per layer type."""
    blocks = 1 + max(int(name.split(".")[1]) for name in allocations[0].bits)
    top = max(max(each.bits.values()) for each in allocations)
    figure = Figure(figsize=(max(6.0, 0.4 * blocks + 2), 1.6 * len(allocations) + 0.6), layout="constrained")
    for axes, each in zip(figure.subplots(len(allocations), squeeze=False)[:, 0], allocations, strict=True):
        grid = np.full((len(LAYER_TYPES), blocks), np.nan)
        for name, width in each.bits.items():
            row, column = LAYER_TYPES.index(name.rpartition(".")[2]), int(name.split(".")[1])
            grid[row, column] = width
            dark = width < (1 + top) / 2
            axes.text(column, row, str(width), ha="center", va="center", color="white" if dark else "black")
        axes.imshow(grid, cmap="viridis", vmin=1, vmax=top, aspect="auto")
        title = f"{each.method.replace('_', ' ')}: {each.average_bits:.3f} bits, predicted {each.predicted_loss:+.3g}"
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(LAYER_TYPES)), LAYER_TYPES)
        axes.set_xticks(range(blocks))
    axes.set_xlabel("block")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
