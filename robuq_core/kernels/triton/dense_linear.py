"""Full-precision ``y = x W^T + b`` for the few layers that stay float32: embedders and the final layer.

A library picks its algorithm, and with it the order of sums, by the number of rows. Here one tile shape serves all of
them and each sum runs over k in ascending order, in float32 throughout: a row's result is its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robuq_core.kernels.triton.config import LaunchConfig, launching

CONFIG = LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2)


@triton.jit(do_not_specialize=["rows"])
def dense_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
        at = output[None, :] * K + k[:, None]
        weight = tl.load(weight_ptr + at, mask=(output < N)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    y = total + tl.load(bias_ptr + output, mask=output < N, other=0.0)[None, :]
    tl.store(y_ptr + row[:, None] * N + output[None, :], y, mask=(row < rows)[:, None] & (output < N)[None, :])


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Launch the kernel on checked, contiguous float32 ``x [M, K]``, ``weight [N, K]``, ``bias [N]`` -> ``[M, N]``."""
    rows, outputs = x.shape[0], weight.shape[0]
    y = torch.empty(rows, outputs, device=x.device)
    if rows and outputs:
        blocks = CONFIG.blocks
        with launching(x):
            dense_linear_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(outputs, blocks["BLOCK_N"]))](
                *(x, weight, bias, y, rows), N=outputs, K=x.shape[1], **CONFIG.options()
            )
    return y
