"""The leading singular triplets of a matrix: exactly where it is small, by randomised subspace iteration where not."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this smaller side the full decomposition is cheap.
_EXACT_SIDE = 512
_OVERSAMPLING = 16
_ITERATIONS = 6


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, rank]``, ``S [rank]`` descending and ``V^T [rank, n]`` of ``matrix [m, n]``, in its dtype.

    Large matrices: algorithms 4.4 and 5.1 of arXiv 0909.4061 with a fixed start, so that the result is the same every
    time; ``U S V^T`` then misses the best approximation by a fraction of a percent at most.
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
