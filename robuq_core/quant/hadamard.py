"""Hadamard matrices by construction and the randomised full-width rotation of eq. (1).

Orders ``b * 2**k`` with ``b`` in {1, 12, 20, 28, 36}: Paley I (q = 11, 19), Paley II (q = 13, 17)
and Sylvester's doubling. No tables: every matrix is generated and checked.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

_PALEY_PRIME = {12: (1, 11), 20: (1, 19), 28: (2, 13), 36: (2, 17)}
BASE_ORDERS = (1, *_PALEY_PRIME)


def decompose_order(order: int) -> tuple[int, int]:
    """Split ``order`` into ``(base, power)`` with ``order == base * power`` and ``power = 2**k``."""
    for base in BASE_ORDERS:
        power, rest = divmod(order, base)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            return base, power
    raise ValueError(f"no Hadamard matrix of order {order}: use a width of 2^k, 12*2^k, 20*2^k, 28*2^k or 36*2^k")


def _jacobsthal(q: int) -> Tensor:
    squares = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0] + [1 if d in squares else -1 for d in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return chi[(index[:, None] - index[None, :]) % q]


def _paley(construction: int, q: int) -> Tensor:
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if construction == 1 else 1
    core[1:, 1:] = _jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if construction == 1:
        return eye + core
    on_sign = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on_zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, on_sign) + torch.kron(eye, on_zero)


@lru_cache(maxsize=64)
def hadamard_matrix(order: int) -> Tensor:
    """The +-1 matrix ``H_base (x) Sylvester(2^k)``, float64 ``[order, order]``, with ``H H^T = order I``."""
    base, power = decompose_order(order)
    matrix = _paley(*_PALEY_PRIME[base]) if base > 1 else torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(matrix, two)
    return matrix


def _kron_factors(order: int) -> tuple[int, int]:
    """``(left, right)`` orders of ``H_left (x) H_right`` with the fewest multiplications."""
    base, power = decompose_order(order)
    choices = [(base << i, power >> i) for i in range(power.bit_length())]
    return min(choices, key=lambda pair: pair[0] + pair[1])


def rotation_factors(width: int, block: int | None = None) -> tuple[int, int, int]:
    """``(copies, left, right)``: the rotation of ``width`` is ``I_copies (x) H_left (x) H_right``.

    ``block``: width of each copy; ``None`` is the whole width, 1 no rotation at all.
    """
    if block is None:
        return 1, *_kron_factors(width)
    if block < 1 or width % block:
        raise ValueError(f"a rotation block must divide the width {width}, and {block} does not")
    return width // block, *_kron_factors(block)


class Rotation(nn.Module):
    """Randomised rotation ``x_H = (x . D) H / sqrt(n)``, eq. (1); orthonormal, so products are unchanged.

    Args:
        width: n, the size of the last dimension.
        signs: the stored +-1 vector D, ``[n]``; ``None`` means all ones.
        block: rotate blocks of this width, each by itself; 1 only applies the signs. Default: the whole width.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, width: int, signs: Tensor | None = None, block: int | None = None) -> None:
        super().__init__()
        _, left, right = rotation_factors(width, block)
        self.width, self.block = width, block
        self.register_buffer("signs", torch.ones(width) if signs is None else signs.to(torch.float32))
        self.register_buffer("left", hadamard_matrix(left).float(), persistent=False)
        self.register_buffer("right", hadamard_matrix(right).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the last dimension of ``x`` ``[..., n]``: float32 of narrower types, else same dtype; same shape.

        Autocast does not apply. The matrices stay +-1, exact in every dtype, and the product is scaled afterwards.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            return _times_kronecker(x * self.signs.to(x.dtype), self.left, self.right)


def undo_rotation(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The inverse of the :class:`Rotation` with these buffers."""
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        return _times_kronecker(x, left.T, right.T) * signs.to(x.dtype)


def _times_kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x (left (x) right) / sqrt(order)``, each block of ``order`` values of the last dimension by itself."""
    rows, columns = len(left), len(right)
    if rows * columns == 1:
        return x
    # x (H_L (x) H_R), with x seen as an L x R matrix, is H_L^T X H_R.
    x_MLR = x.reshape(-1, rows, columns)
    rotated = left.to(x.dtype).T @ (x_MLR @ right.to(x.dtype))
    return (rotated * (1 / math.sqrt(rows * columns))).reshape(x.shape)


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """A +-1 vector ``[width]``, float32, drawn from ``generator``."""
    return torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
