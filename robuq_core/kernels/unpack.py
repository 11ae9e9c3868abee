"""A file's base-3 weights to the planar form that kernels read: natively where the library is built."""

from __future__ import annotations

from torch import Tensor

from robuq_core.kernels.cpu import NativeUnavailableError, load_library
from robuq_core.quant import packing


def planar_from_base3(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """:func:`robuq_core.quant.packing.planar_from_base3`, many times as fast where the native library is built.

    Args:
        packed: uint8 ``[ceil(N K / 5)]``, ``shape`` being ``(N, K)``; the native way is for the CPU's memory.

    Raises:
        ValueError: another dtype or length than ``shape`` asks for, or a byte above 242.
    """
    try:
        library = load_library() if packed.device.type == "cpu" else None
    except NativeUnavailableError:
        library = None
    if library is None:
        return packing.planar_from_base3(packed, shape)
    packing.check_base3(packed, shape)
    rows, in_features = shape
    packed, planar = packed.contiguous(), packed.new_empty(rows, packing.planar_width(in_features))
    library.robuq_planar_from_base3(packed.data_ptr(), rows, in_features, planar.data_ptr())
    return planar
