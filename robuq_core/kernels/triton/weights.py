"""A layer, or a group of equal layers, as the kernels read it: with rotation matrices and folded low-rank factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robuq_core.kernels.ops import LayerGroup, TernaryLayer
from robuq_core.kernels.triton.lowrank import folded
from robuq_core.quant.choices import Grid


@dataclass(frozen=True)
class Weights:
    """Tensors as of :class:`~robuq_core.kernels.ops.TernaryLayer`; of a group, each has its number of layers first.

    ``folded``: B' of :mod:`robuq_core.kernels.triton.lowrank`, float32 ``[r, K]``. ``left``, ``right``: the matrices of
    :mod:`robuq_core.kernels.triton.rotate_quantize`.
    """

    planar: Tensor
    alpha: Tensor
    bias: Tensor
    signs: Tensor
    lowrank_a: Tensor
    folded: Tensor
    left: Tensor
    right: Tensor
    bits: int
    grid: Grid
    block: int | None

    @property
    def lead(self) -> tuple[int, ...]:
        """The number of layers of a group, ``()`` of a single layer."""
        return self.signs.shape[:-1]

    @property
    def width(self) -> int:
        return self.signs.shape[-1]

    @property
    def outputs(self) -> int:
        return self.alpha.shape[-1]

    @property
    def rank(self) -> int:
        return self.lowrank_a.shape[-1]


def weights_of(layer: TernaryLayer | LayerGroup, left: Tensor, right: Tensor) -> Weights:
    """``layer`` with its low-rank factor folded."""
    if isinstance(layer, LayerGroup):
        first, stacked = layer.layers[0], layer.stacked
        factor = torch.stack([folded(each.lowrank_b, each.signs, each.rotation_block) for each in layer.layers])
    else:
        first = stacked = layer
        factor = folded(layer.lowrank_b, layer.signs, layer.rotation_block)
    return Weights(
        *(stacked.planar, stacked.alpha, stacked.bias, stacked.signs, stacked.lowrank_a, factor, left, right),
        *(first.bits, first.grid, first.rotation_block),
    )
