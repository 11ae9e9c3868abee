"""Operations on single values that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Inline assembly: from four bytes the digits of their four planes, four at a time.
UNPACK = tl.constexpr(
    "{\n.reg .b32 t;\nand.b32 $0, $4, 0x03030303;\n"
    + "".join(f"shr.u32 t, $4, {2 * i};\nand.b32 ${i}, t, 0x03030303;\n" for i in (1, 2, 3))
    + "}"
)


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """The tanh form."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@triton.jit
def tf32_parts(x):  # type: ignore[no-untyped-def]
    """``x`` as a sum of two values of tf32's 11 significant bits (the product itself cuts off the second)."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def rounded_for(pointer, x):  # type: ignore[no-untyped-def]
    """Float32 ``x`` in the dtype of ``pointer``, to the nearest, ties to even."""
    return x.to(pointer.dtype.element_ty)
