"""The shape of a layer's activations, token by token, from a stream: moments, distance to the normal, error by bits.

Memory is a histogram and a few sums a layer, whatever passes through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robuq_core.quant.activation import MAX_BITS, MIN_BITS, SIGMA_PER_MEAN_ABS, fake_quantize_activation
from robuq_core.quant.choices import ActivationRule, Grid

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
        """Tokens of zeros alone, which any quantiser gets right, are left out."""
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
    """The error of tokens that are normal, which none of ``x / sigma`` can be told from."""
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
