"""Eight-bit attention products: symmetric per-token Q and K, per-head V, unsigned P.

The paper gives 8/8 bits for ``Q K^T`` and ``P V`` and no method; this one keeps both products exact integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.quant.activation import straight_through

SIGNED_TOP, UNSIGNED_TOP = 127, 255


def quantize_signed(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes in -127..127 (in the dtype of ``x``) and the scale ``max|x| / 127`` taken over ``dims``."""
    scale = x.abs().amax(dim=dims, keepdim=True) / SIGNED_TOP
    return torch.round(x / scale.clamp(min=1e-30)), scale


def quantized_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention whose two products run on 8-bit operands; straight-through gradients.

    Args:
        q, k, v: ``[B, heads, L, head_dim]``, float32 for exact products.

    Returns:
        ``[B, heads, L, head_dim]``, same dtype.
    """

    def fake(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        codes, scale = quantize_signed(x.detach(), dims)
        return straight_through(x, codes * scale)

    logits = (fake(q, (-1,)) @ fake(k, (-1,)).transpose(-2, -1)) * q.shape[-1] ** -0.5
    p = logits.softmax(dim=-1)
    p = straight_through(p, torch.round(p.detach() * UNSIGNED_TOP) / UNSIGNED_TOP)
    return p @ fake(v, (-2, -1))
