"""Float32 results into the dtype that a kernel stores."""

from __future__ import annotations

import triton


@triton.jit
def rounded_for(pointer, x):  # type: ignore[no-untyped-def]
    """Float32 ``x`` in the dtype of ``pointer``, to the nearest, ties to even."""
    return x.to(pointer.dtype.element_ty)
