"""Eight-bit attention: symmetric per-token Q and K, per-head V, and codes of ``exp(l - max)`` for probabilities.

The paper gives 8/8 bits for ``Q K^T`` and ``P V`` but no method; here both products and the normalising sum of a row
are exact integers. Codes of normalised probabilities would lose diffuse rows: with L tokens their mean is
``255 / L``, less than half a code from 512 tokens on. Here the largest entry of a row always has code 255.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.quant.activation import straight_through

SIGNED_TOP, UNSIGNED_TOP = 127, 255


def quantize_signed(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes in -127..127 (in the dtype of ``x``) and the scale ``max|x| / 127`` over ``dims``, at least 1e-30."""
    scale = (x.abs().amax(dim=dims, keepdim=True) / SIGNED_TOP).clamp(min=1e-30)
    return torch.round(x / scale), scale


def quantized_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention whose two products run on 8-bit operands; straight-through gradients.

    With integer codes ``q, k, v`` and scales ``s``: ``l_ij = (q_i . k_j) s_i s_j / sqrt(head_dim)``,
    ``c_ij = round(255 exp(l_ij - max_j l_ij))``, and ``out_i = (sum_j c_ij v_j) (s_v / sum_j c_ij)``.

    Computes in float32 (float64 for float64 inputs), regardless of autocast. Products of codes are exact, in TF32 too,
    while their partial sums stay below 2^24.

    Args:
        q, k, v: ``[B, heads, L, head_dim]``, floating point.

    Returns:
        ``[B, heads, L, head_dim]``, dtype of ``v``.
    """
    with torch.autocast(q.device.type, enabled=False):
        q_codes, q_scale = _codes(q, (-1,))
        k_codes, k_scale = _codes(k, (-1,))
        v_codes, v_scale = _codes(v, (-2, -1))
        logits = q_codes @ k_codes.transpose(-2, -1)
        logits = logits.mul_(q_scale * q.shape[-1] ** -0.5).mul_(k_scale.transpose(-2, -1))
        # A shift of a row's logits changes nothing, so no gradient flows through the maximum.
        values = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp().mul(UNSIGNED_TOP)
        codes = straight_through(values, torch.round(values.detach()))
        return ((codes @ v_codes) * (v_scale / codes.sum(dim=-1, keepdim=True))).to(v.dtype)


def _codes(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """:func:`quantize_signed` with the gradient of ``x / scale``."""
    x = x if x.dtype == torch.float64 else x.float()
    codes, scale = quantize_signed(x.detach(), dims)
    return straight_through(x / scale, codes), scale
