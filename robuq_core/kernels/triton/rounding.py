"""Float32 results into the dtype that a kernel stores."""

from __future__ import annotations

import triton
import triton.language as tl

from robuq_core.kernels.triton.config import is_interpreted

_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def rounded_for(pointer, x):  # type: ignore[no-untyped-def]
    """Float32 ``x`` in the dtype of ``pointer``, to the nearest, ties to even.

    A GPU's conversion rounds so by itself. The interpreter's cuts off: there, the bits are rounded first.
    """
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 32767 + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest, bits | 0x400000)  # NaN stays NaN where it loses its lower bits
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(pointer.dtype.element_ty)
