"""Two packed forms of a ternary matrix: base 3 for files (1.6 bits per weight), planar 2-bit for kernels.

Base 3: the matrix flat in row-major order, five codes a byte, ``sum_i (t_i + 1) 3^i``. Planar: each row in groups of
128 along K; byte j of a group's 32 holds k = j, j + 32, j + 64, j + 96 in bits 0-1, 2-3, 4-5, 6-7, each as ``t + 1``:
one 32-byte load and four constant shifts and masks give 128 weights in order. Padding is code 0 in both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRITS_PER_BYTE = 5
BASE3_TOP = 3**TRITS_PER_BYTE - 1
PLANAR_GROUP, PLANAR_GROUP_BYTES = 128, 32
_CODES_PER_BYTE = PLANAR_GROUP // PLANAR_GROUP_BYTES


def base3_size(count: int) -> int:
    """Bytes that ``count`` codes take in base 3."""
    return -(-count // TRITS_PER_BYTE)


def planar_width(in_features: int) -> int:
    """Bytes that a row of ``in_features`` codes takes in the planar form."""
    return -(-in_features // PLANAR_GROUP) * PLANAR_GROUP_BYTES


def _digits(codes: Tensor) -> Tensor:
    """``t + 1`` as uint8; checks that the codes are ternary."""
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"ternary codes must be an int8 matrix, not {codes.dtype} of shape {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise ValueError("ternary codes must be -1, 0 or 1")
    return (codes + 1).to(torch.uint8)


def pack_base3(codes: Tensor) -> Tensor:
    """``codes`` int8 ``[N, K]`` -> uint8 ``[ceil(N K / 5)]``."""
    digits = _digits(codes).reshape(-1)
    padded = torch.ones(base3_size(digits.numel()) * TRITS_PER_BYTE, dtype=torch.uint8, device=codes.device)
    padded[: digits.numel()] = digits
    columns = padded.reshape(-1, TRITS_PER_BYTE)
    packed = columns[:, -1].clone()
    for i in reversed(range(TRITS_PER_BYTE - 1)):
        packed.mul_(3).add_(columns[:, i])
    return packed


def planar_from_base3(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes ``shape`` of :func:`pack_base3` in the form of :func:`pack_planar`."""
    check_base3(packed, shape)
    powers = 3 ** torch.arange(TRITS_PER_BYTE, device=packed.device)
    digits = packed[:, None] // powers.to(torch.uint8) % 3
    return _pack_digits(digits.flatten()[: math.prod(shape)].reshape(shape))


def check_base3(packed: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError for another dtype or length than ``shape`` asks for, or a byte above 242."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (base3_size(count),):
        raise ValueError(f"a ternary matrix of shape {tuple(shape)} needs {base3_size(count)} uint8 bytes, "
                         f"not {packed.dtype} of shape {tuple(packed.shape)}")  # fmt: skip
    if packed.numel() and int(packed.max()) > BASE3_TOP:
        raise ValueError(f"packed ternary bytes must be 0..{BASE3_TOP}, found {int(packed.max())}")


def pack_planar(codes: Tensor) -> Tensor:
    """``codes`` int8 ``[N, K]`` -> uint8 ``[N, ceil(K / 128) * 32]``."""
    return _pack_digits(_digits(codes))


def _pack_digits(digits: Tensor) -> Tensor:
    rows, in_features = digits.shape
    if rest := -in_features % PLANAR_GROUP:
        digits = torch.cat([digits, digits.new_ones(rows, rest)], dim=1)
    # Eight bytes at a time: digits are at most 2, so shifts stay within a byte.
    words = digits.contiguous().view(torch.int64).reshape(-1, _CODES_PER_BYTE, PLANAR_GROUP_BYTES // 8)
    packed = words[:, -1].clone()
    for i in reversed(range(_CODES_PER_BYTE - 1)):
        packed <<= 2
        packed |= words[:, i]
    return packed.view(torch.uint8).reshape(rows, planar_width(in_features))


def unpack_planar(planar: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_planar`: uint8 ``[N, ceil(K / 128) * 32]`` -> int8 ``[N, in_features]``."""
    width = planar_width(in_features)
    if planar.dtype != torch.uint8 or planar.dim() != 2 or planar.shape[1] != width:
        raise ValueError(f"{in_features} packed 2-bit codes per row need uint8 [N, {width}], "
                         f"not {planar.dtype} of shape {tuple(planar.shape)}")  # fmt: skip
    groups = planar.reshape(planar.shape[0], -1, 1, PLANAR_GROUP_BYTES)
    planes = torch.cat([(groups >> (2 * i)) & 3 for i in range(_CODES_PER_BYTE)], dim=2)
    return planes.reshape(planar.shape[0], -1)[:, :in_features].to(torch.int8) - 1
