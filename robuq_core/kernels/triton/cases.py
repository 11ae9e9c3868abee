"""The launches of DiT-XL/2 as compile-time cases: what tests and the resource report compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robuq_core.kernels.triton import attention, dense_linear, rotate_quantize, ternary_linear
from robuq_core.kernels.triton.aot import Compiled, compile_ahead
from robuq_core.kernels.triton.config import LaunchConfig

RANK, BITS, HEAD_DIM = 16, 3, 72

_ROTATE_TYPES = {
    **dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "signs_ptr", "lowrank_b_ptr"), "*fp32"),
    **dict.fromkeys(("left_ptr", "right_ptr"), "*fp16"),
    **dict.fromkeys(("scales_ptr", "lowrank_ptr"), "*fp32"),
    **dict.fromkeys(("tokens_total", "tokens_per_image"), "i32"),
    "codes_ptr": "*i8",
    "eps": "fp32",
}
_LINEAR_TYPES = {
    **dict.fromkeys(("scales_ptr", "lowrank_ptr", "alpha_ptr", "bias_ptr", "lowrank_a_ptr", "y_ptr"), "*fp32"),
    **dict.fromkeys(("rows", "N"), "i32"),
    "codes_ptr": "*i8",
}


@dataclass(frozen=True)
class Case:
    """One kernel with all that its compilation needs but the architecture."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    config: LaunchConfig

    def compile(self, architecture: int) -> Compiled:
        return compile_ahead(self.kernel, self.types, self.constants, self.config, architecture)


def cases(architecture: int) -> Iterator[Case]:
    """Every kernel in the launch shapes that untuned DiT-XL/2 meets on ``architecture``."""
    for width, kind, block, name in (
        (1152, rotate_quantize.MODULATE, None, "LayerNorm, 1152"),
        (1152, rotate_quantize.MODULATE, 128, "LayerNorm, 1152 in blocks of 128"),
        (1152, rotate_quantize.NO_PROLOGUE, None, "1152"),
        (1152, rotate_quantize.SILU, None, "SiLU, 1152"),
        (4608, rotate_quantize.GELU, None, "GELU, 4608"),
    ):
        yield Case(
            f"rotate_quantize, {name}",
            rotate_quantize.rotate_quantize_kernel,
            _ROTATE_TYPES,
            rotate_quantize.constants(width, RANK, kind, BITS, True, block),
            rotate_quantize.default_config(width),
        )
    for rows, width, outputs, packed in (
        (2048, 1152, 3456, True),
        (2048, 4608, 1152, True),
        (16, 1152, 6912, True),
        (2048, 1152, 3456, False),
    ):
        form = "2-bit" if packed else "int8"
        yield Case(
            f"ternary_linear, {form}, {rows} rows, {width} x {outputs}",
            ternary_linear.ternary_linear_kernel,
            {**_LINEAR_TYPES, "weight_ptr": "*u8" if packed else "*i8"},
            ternary_linear.constants(width, RANK, packed, True),
            ternary_linear.default_config(rows, outputs, architecture),
        )
    fixed = attention.constants(HEAD_DIM)
    yield Case(
        f"quantize_heads, {HEAD_DIM}",
        attention.quantize_heads_kernel,
        attention.SIGNATURE,
        fixed,
        attention.quantize_config(HEAD_DIM),
    )
    yield Case(
        f"attention, {HEAD_DIM}",
        attention.attention_kernel,
        attention.SIGNATURE,
        fixed,
        attention.default_config(HEAD_DIM),
    )
    yield Case(
        "dense_linear, final layer",
        dense_linear.dense_linear_kernel,
        dense_linear.SIGNATURE,
        {"K": 1152, "N": 32},
        dense_linear.CONFIG,
    )
