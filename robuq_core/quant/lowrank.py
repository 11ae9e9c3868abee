"""Low-rank branch, eq. (2): the part of a rotated weight that ternary codes represent worst."""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.quant.activation import straight_through
from robuq_core.quant.choices import LowRankInit

# Up to this smaller side the full decomposition is cheap.
_EXACT_SIDE = 512
_OVERSAMPLING = 16
_ITERATIONS = 6


def lowrank_split(
    weight: Tensor, rank: int, init: LowRankInit = "svd", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``W_H`` into a rank-``rank`` product and the residual to be ternarised.

    ``svd``: ``W_H ~ A B`` by truncated SVD with sqrt(S) split evenly between the factors; ``R = W_H - A B``.
    ``zero``: ``A = 0``, ``B`` normal with variance ``1 / in``, so that ``R = W_H`` and A learns from the first step
    (as in LoRA, arXiv 2106.09685).

    Args:
        weight: ``[out, in]`` in the rotated basis.
        rank: 0 disables the branch; must be below ``min(out, in)``.
        generator: of the random ``B``, on the CPU; default: torch's.

    Returns:
        ``A [out, rank]``, ``B [rank, in]``, ``R [out, in]``, all in the dtype of ``weight``.
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


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, rank]``, ``S [rank]`` descending and ``V^T [rank, n]`` of ``matrix [m, n]``, in its dtype.

    Large matrices: randomised subspace iteration, algorithms 4.4 and 5.1 of arXiv 0909.4061, with a fixed seed; its
    error exceeds the best approximation's by at most a fraction of a percent.
    """
    if min(matrix.shape) <= _EXACT_SIDE or rank + _OVERSAMPLING >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    start = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def round_to_storage(factor: Tensor) -> Tensor:
    """A low-rank factor rounded to bf16 as in the packed file; the gradient is the identity."""
    return straight_through(factor, factor.detach().bfloat16().to(factor.dtype))
