"""From a trained, fake-quantised linear to the layer that the backends run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robuq_core.kernels.ops import TernaryLayer
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.quant.choices import Grid
from robuq_core.quant.packing import pack_planar


@torch.no_grad()
def pack_layer(linear: QuantLinear) -> TernaryLayer:
    """``linear`` as a :class:`TernaryLayer` on the same device, holding the very numbers of its forward:
    ``alpha`` as fp16 keeps it, in float32, and the low-rank factors in bf16."""
    codes, alpha = linear.planes()
    return layer_of_planes(
        [pack_planar(plane) for plane in codes],
        list(alpha),
        bias=linear.bias.detach().float().clone(),
        signs=linear.rotation.get_buffer("signs").detach().clone(),
        lowrank_a=linear.lowrank_a.detach().bfloat16().contiguous(),
        lowrank_b=linear.lowrank_b.detach().bfloat16().contiguous(),
        bits=linear.bits,
        grid=linear.grid,
        rotation_block=linear.rotation.block,
    )


def layer_of_planes(
    planars: Sequence[Tensor],
    alphas: Sequence[Tensor],
    *,
    bias: Tensor,
    signs: Tensor,
    lowrank_a: Tensor,
    lowrank_b: Tensor,
    bits: int,
    grid: Grid,
    rotation_block: int | None,
) -> TernaryLayer:
    """The layer whose weight is ``sum_p alphas[p] planars[p]``, the coarsest plane first.

    The first plane carries bias and low-rank branch; the others share its signs, though nothing rotates for them again.
    """

    def plane(i: int, extra_planes: tuple[TernaryLayer, ...] = ()) -> TernaryLayer:
        first = i == 0
        return TernaryLayer(
            planar=planars[i],
            alpha=alphas[i].contiguous(),
            bias=bias if first else torch.zeros_like(bias),
            signs=signs,
            lowrank_a=lowrank_a if first else lowrank_a.new_empty(len(bias), 0),
            lowrank_b=lowrank_b if first else lowrank_b.new_empty(0, len(signs)),
            bits=bits,
            grid=grid,
            rotation_block=rotation_block,
            extra_planes=extra_planes,
        )

    return plane(0, tuple(plane(i) for i in range(1, len(planars))))
