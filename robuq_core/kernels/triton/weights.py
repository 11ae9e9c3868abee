"""A layer, or a group of equal layers, as the kernels read it: with rotation matrices and folded low-rank factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robuq_core.kernels.ops import LayerGroup, TernaryLayer
from robuq_core.quant.hadamard import hadamard_matrix, rotation_factors


@dataclass(frozen=True)
class Weights:
    """``layer``: as of :class:`~robuq_core.kernels.ops.TernaryLayer`, A in float32, and B' of :func:`folded` in
    place of B. Tensors of a group have its number of layers first, which ``lead`` holds. ``left``, ``right``: the
    matrices of :mod:`robuq_core.kernels.triton.rotate_quantize`."""

    layer: TernaryLayer
    left: Tensor
    right: Tensor

    @property
    def lead(self) -> tuple[int, ...]:
        return self.layer.signs.shape[:-1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Outputs, width, rank."""
        return self.layer.alpha.shape[-1], self.layer.signs.shape[-1], self.layer.lowrank_a.shape[-1]


def weights_of(layer: TernaryLayer | LayerGroup, left: Tensor, right: Tensor) -> Weights:
    if isinstance(layer, LayerGroup):
        whole, b = layer.stacked, torch.stack([*map(folded, layer.layers)])
    else:
        whole, b = layer, folded(layer)
    return Weights(replace(whole, lowrank_a=whole.lowrank_a.float(), lowrank_b=b), left, right)


@torch.no_grad()
def folded(layer: TernaryLayer) -> Tensor:
    """``B' = (B H^T) D``, computed in float64: float32 ``[r, K]``. The low-rank term of eq. (2) from the unrotated
    input: ``x_H = (p(x) D) H`` for a prologue p, so that ``x_H B^T = p(x) B'^T``."""
    copies, left, right = rotation_factors(layer.in_features, layer.rotation_block)
    b_rCLR = layer.lowrank_b.double().cpu().reshape(layer.rank, copies, left, right)
    rotated = hadamard_matrix(left) @ b_rCLR @ hadamard_matrix(right).T
    scaled = rotated.reshape(layer.rank, layer.in_features) * layer.signs.double().cpu() / math.sqrt(left * right)
    return scaled.float().to(layer.lowrank_b.device)
