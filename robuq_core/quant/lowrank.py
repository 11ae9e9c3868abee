"""Low-rank branch, eq. (2): the part of a rotated weight that ternary codes would serve worst."""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.quant.activation import straight_through
from robuq_core.quant.choices import LowRankInit
from robuq_core.quant.truncated_svd import truncated_svd


def lowrank_split(
    weight: Tensor, rank: int, init: LowRankInit = "svd", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``W_H`` into a rank-``rank`` product and the residual to be ternarised.

    ``svd``: ``W_H ~ A B`` by truncated SVD with sqrt(S) split evenly between the factors; ``R = W_H - A B``.
    ``zero``: ``A = 0``, ``B`` normal with variance ``1 / in``, so that ``R = W_H`` and A learns from the first step
    (as in LoRA, arXiv 2106.09685).

    Args:
        weight: ``[out, in]`` in the rotated basis.
        rank: 0 disables the branch; a rank of at least ``min(out, in)`` is refused.
        generator: of the random ``B``, on the CPU; default: torch's own.

    Returns:
        ``A [out, rank]``, ``B [rank, in]``, ``R [out, in]``, all in the dtype of ``weight``.

    Raises:
        ValueError: rank is negative or leaves no residual.
    """
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1]), weight.clone()
    if not 0 < rank < min(weight.shape):
        raise ValueError(f"rank must be 0..{min(weight.shape) - 1} for a weight of {tuple(weight.shape)}, not {rank}")
    if init == "zero":
        b = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        return weight.new_zeros(weight.shape[0], rank), b.to(weight), weight.clone()
    u, s, vh = truncated_svd(weight.double(), rank)
    root = s.sqrt()
    a = (u * root).to(weight.dtype)
    b = (root[:, None] * vh).to(weight.dtype)
    return a, b, weight - a @ b


def round_to_storage(factor: Tensor) -> Tensor:
    """The value that a bf16 file keeps of a low-rank factor; the gradient is the identity."""
    return straight_through(factor, factor.detach().bfloat16().to(factor.dtype))
