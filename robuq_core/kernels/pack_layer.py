"""From a trained, fake-quantised linear to the layer that the backends run."""

from __future__ import annotations

import torch

from robuq_core.kernels.ops import TernaryLayer
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.quant.lowrank import round_to_storage
from robuq_core.quant.packing import pack_planar
from robuq_core.quant.ternary import ternarize


@torch.no_grad()
def pack_layer(linear: QuantLinear) -> TernaryLayer:
    """``linear`` as a :class:`TernaryLayer` on the same device, holding the very numbers of its forward:
    ``alpha`` as fp16 keeps it, the low-rank factors as bf16 keeps them, all in float32."""
    codes, alpha = ternarize(linear.weight.detach().float(), linear.weight_scale)
    return TernaryLayer(
        planar=pack_planar(codes),
        alpha=alpha,
        bias=linear.bias.detach().float().clone(),
        signs=linear.rotation.get_buffer("signs").detach().clone(),
        lowrank_a=round_to_storage(linear.lowrank_a.detach().float()).contiguous(),
        lowrank_b=round_to_storage(linear.lowrank_b.detach().float()).contiguous(),
        bits=linear.bits,
        grid=linear.grid,
        rotation_block=linear.rotation.block,
    )
