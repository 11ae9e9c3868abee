"""The launches of DiT-XL/2 as compile-time cases: what tests and the resource report compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robuq_core.kernels.triton import attention, dense_linear, rotate_quantize, ternary_linear
from robuq_core.kernels.triton.aot import Compiled, compile_ahead
from robuq_core.kernels.triton.config import LaunchConfig

RANK, BITS, HEAD_DIM = 16, 3, 72

_BF16 = "*bf16"
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
    multiples_of_16: tuple[str, ...] = ()

    def compile(self, architecture: int) -> Compiled:
        return compile_ahead(
            *(self.kernel, self.types, self.constants, self.config, architecture), self.multiples_of_16
        )


def cases(architecture: int) -> Iterator[Case]:
    """Every kernel in the launch shapes that untuned DiT-XL/2 meets on ``architecture``."""
    yield from _rotations()
    yield from _products(architecture)
    yield from _attentions()
    yield Case(
        "dense_linear, final layer",
        dense_linear.dense_linear_kernel,
        dense_linear.SIGNATURE,
        {"K": 1152, "N": 32},
        dense_linear.CONFIG,
    )


def _rotations() -> Iterator[Case]:
    """What reads bfloat16 where activations are: proj's input and fc2's."""
    for width, kind, block, name, types in (
        (1152, rotate_quantize.MODULATE, None, "LayerNorm, 1152", {}),
        (1152, rotate_quantize.MODULATE, 128, "LayerNorm, 1152 in blocks of 128", {}),
        (1152, rotate_quantize.NO_PROLOGUE, None, "1152", {}),
        (1152, rotate_quantize.SILU, None, "SiLU, 1152", {}),
        (4608, rotate_quantize.GELU, None, "GELU, 4608", {}),
        (1152, rotate_quantize.NO_PROLOGUE, None, "1152, from bf16", {"x_ptr": _BF16}),
        (4608, rotate_quantize.GELU, None, "GELU, 4608, from bf16", {"x_ptr": _BF16}),
    ):
        yield Case(
            f"rotate_quantize, {name}",
            rotate_quantize.rotate_quantize_kernel,
            {**_ROTATE_TYPES, **types},
            rotate_quantize.constants(width, RANK, kind, BITS, True, block),
            rotate_quantize.default_config(width),
        )


def _products(architecture: int) -> Iterator[Case]:
    """What writes bfloat16 where activations are: qkv and fc1, which are one kernel to the compiler."""
    for rows, width, outputs, packed, name, types in (
        (2048, 1152, 3456, True, "", {}),
        (2048, 4608, 1152, True, "", {}),
        (16, 1152, 6912, True, "", {}),
        (2048, 1152, 3456, False, "", {}),
        (2048, 1152, 3456, True, ", to bf16", {"y_ptr": _BF16}),
    ):
        form = "2-bit" if packed else "int8"
        yield Case(
            f"ternary_linear, {form}, {rows} rows, {width} x {outputs}{name}",
            ternary_linear.ternary_linear_kernel,
            {**_LINEAR_TYPES, "weight_ptr": "*u8" if packed else "*i8", **types},
            ternary_linear.constants(width, RANK, packed),
            ternary_linear.default_config(rows, outputs, architecture),
            multiples_of_16=("N",),
        )


def _attentions() -> Iterator[Case]:
    fixed = attention.constants(HEAD_DIM)
    for ends, types in (("", {}), (", bf16", {"qkv_ptr": _BF16, "out_ptr": _BF16})):
        yield Case(
            f"quantize_heads, {HEAD_DIM}{ends}",
            attention.quantize_heads_kernel,
            {**attention.SIGNATURE, **types},
            fixed,
            attention.quantize_config(HEAD_DIM),
        )
        yield Case(
            f"attention, {HEAD_DIM}{ends}",
            attention.attention_kernel,
            {**attention.SIGNATURE, **types},
            fixed,
            attention.default_config(HEAD_DIM),
        )
