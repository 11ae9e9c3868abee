"""Per-output-channel ternary weights, eq. (3), and their straight-through gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

WeightScale = Literal["conditional_mean", "absmean"]


def ternarize(weight: Tensor, scale: WeightScale = "conditional_mean") -> tuple[Tensor, Tensor]:
    """Ternary codes and scales of a matrix ``[out, in]``.

    Eq. (3): ``tau_c = 0.5 mean|R_c|``, ``T_c = sign(R_c)[|R_c| >= tau_c]``, and ``alpha_c`` is the mean of
    ``|R_c|`` where ``T_c != 0`` (``conditional_mean``) or over the whole row (``absmean``, BitNet's rule).

    Returns:
        codes int8 ``[out, in]`` in {-1, 0, 1}; alpha float32 ``[out]``, rounded to fp16, the width in
        which it is stored, so that training and the packed file use the same number.
    """
    magnitude = weight.abs()
    mean = magnitude.mean(dim=1, keepdim=True)
    mask = (magnitude >= 0.5 * mean) & (magnitude > 0)
    codes = torch.where(mask, weight.sign(), torch.zeros_like(weight))
    if scale == "conditional_mean":
        alpha = (magnitude * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    elif scale == "absmean":
        alpha = mean.squeeze(1)
    else:
        raise ValueError(f"weight_scale must be conditional_mean or absmean, not {scale!r}")
    return codes.to(torch.int8), alpha.to(torch.float16).to(torch.float32)


class _TernarySTE(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, scale: WeightScale) -> Tensor:
        codes, alpha = ternarize(weight.float(), scale)
        return (codes * alpha[:, None]).to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.clamp(-1, 1), None


def ternary_fake_quantize(weight: Tensor, scale: WeightScale = "conditional_mean") -> Tensor:
    """``alpha_c T_c`` of ``weight`` ``[out, in]``, same dtype.

    The gradient passes straight through to ``weight``, clamped to [-1, 1] by element; none flows through
    the threshold or the scale.
    """
    return _TernarySTE.apply(weight, scale)  # type: ignore[no-any-return, no-untyped-call]
