"""Per-output-channel ternary weights, eq. (3), sums of several such planes, and their straight-through gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.quant.choices import WeightScale

# Step of the best uniform quantiser of N(0, 1) with 9 and 27 levels including 0: the start of the fit of a row.
_GAUSSIAN_STEP = {2: 0.535, 3: 0.22}
_REFITS = 4


def ternarize(weight: Tensor, scale: WeightScale = "conditional_mean") -> tuple[Tensor, Tensor]:
    """Ternary codes and scales of a matrix ``[out, in]``.

    Eq. (3): ``tau_c = 0.5 mean|R_c|``, ``T_c = sign(R_c)[|R_c| >= tau_c]``, and ``alpha_c`` is the mean of
    ``|R_c|`` where ``T_c != 0`` (``conditional_mean``) or over the whole row (``absmean``, BitNet's rule).

    Returns:
        codes int8 ``[out, in]`` in {-1, 0, 1}; alpha float32 ``[out]``, rounded to fp16 as in the packed file.
    """
    magnitude = weight.abs()
    mean = magnitude.mean(dim=1, keepdim=True)
    mask = (magnitude >= 0.5 * mean) & (magnitude > 0)
    codes = torch.where(mask, weight.sign(), 0.0)
    if scale == "conditional_mean":
        alpha = magnitude.mul_(mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    elif scale == "absmean":
        alpha = mean.squeeze(1)
    else:
        raise ValueError(f"weight_scale must be conditional_mean or absmean, not {scale!r}")
    return codes.to(torch.int8), _stored(alpha)


def ternary_planes(weight: Tensor, planes: int = 1, scale: WeightScale = "conditional_mean") -> tuple[Tensor, Tensor]:
    """``weight [out, in] ~ sum_p alpha_p T_p`` with ``planes`` ternary matrices, coarsest first.

    One plane is :func:`ternarize`. P planes hold the ``3^P`` integers k of a uniform grid in balanced ternary,
    ``k = sum_p 3^(P-1-p) T_p``; each row's step is fitted by alternating ``k = round(R / step)`` with the least-squares
    ``step = <R, k> / <k, k>``; ``scale`` is then ignored.

    Returns:
        codes int8 ``[planes, out, in]``; alpha float32 ``[planes, out]``, each rounded to fp16.
    """
    if planes == 1:
        codes, alpha = ternarize(weight, scale)
        return codes[None], alpha[None]
    if planes not in _GAUSSIAN_STEP:
        raise ValueError(f"weight_planes must be 1..3, not {planes}")
    top = (3**planes - 1) // 2
    step = weight.square().mean(dim=1, keepdim=True).sqrt() * _GAUSSIAN_STEP[planes]
    for _ in range(_REFITS):
        levels = _levels(weight, step, top)
        step = (weight * levels).sum(dim=1, keepdim=True) / levels.square().sum(dim=1, keepdim=True).clamp(min=1)
    return planes_of_levels(_levels(weight, step, top), step.squeeze(1), planes)


def planes_of_levels(levels: Tensor, step: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """``step_c k_c`` as ``planes`` ternary matrices: the digits of ``k`` in balanced ternary, coarsest first.

    Args:
        levels: integers ``[out, in]`` of any dtype, at most ``(3^planes - 1) / 2`` in size. step: ``[out]``.

    Returns:
        as :func:`ternary_planes`.
    """
    rest = levels.to(torch.int8)
    digits = []
    for _ in range(planes):
        digits.append(torch.remainder(rest + 1, 3) - 1)
        rest = (rest - digits[-1]) // 3
    powers = torch.tensor([3.0**p for p in reversed(range(planes))], device=step.device)
    return torch.stack(digits[::-1]), _stored(powers[:, None] * step)


def _levels(weight: Tensor, step: Tensor, top: int) -> Tensor:
    # A row of zeros has step 0; the clamp keeps its levels finite.
    return torch.round(weight / step.clamp(min=1e-30)).clamp(-top, top)


def _stored(alpha: Tensor) -> Tensor:
    return alpha.to(torch.float16).to(torch.float32)


class _TernarySTE(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, scale: WeightScale, planes: int, made: tuple[Tensor, Tensor] | None) -> Tensor:
        codes, alpha = ternary_planes(weight.float(), planes, scale) if made is None else made
        total = codes[0] * alpha[0][:, None]
        for p in range(1, planes):
            total += codes[p] * alpha[p][:, None]
        return total.to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.clamp(-1, 1), None, None, None


def ternary_fake_quantize(
    weight: Tensor,
    scale: WeightScale = "conditional_mean",
    planes: int = 1,
    made: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``sum_p alpha_pc T_pc`` of ``weight`` ``[out, in]``, same dtype.

    The gradient passes straight through to ``weight``, clamped to [-1, 1] by element; none flows through
    the threshold or the scale. ``made``: what :func:`ternary_planes` gives for this very weight, if it is known.
    """
    return _TernarySTE.apply(weight, scale, planes, made)  # type: ignore[no-any-return, no-untyped-call]
