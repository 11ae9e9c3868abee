"""The launches of DiT-XL/2 as compile-time cases: what tests and the resource report compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robuq_core.kernels.triton import attention, dense_linear, rotate_quantize, ternary_linear
from robuq_core.kernels.triton.aot import Compiled, compile_ahead
from robuq_core.kernels.triton.async_linear import async_linear_kernel
from robuq_core.kernels.triton.config import LaunchConfig

RANK, HEAD_DIM = 16, 72

_BF16 = "*bf16"
_ROTATE_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in ("x", "shift", "scale", "signs", "folded", "scales", "lowrank")},
    **{"left_ptr": "*fp16", "right_ptr": "*fp16", "codes_ptr": "*i8", "sums_ptr": "*i32"},
    **dict.fromkeys(("tokens_total", "tokens_per_image"), "i32"),
    **dict.fromkeys(("eps", "step_factor", "top"), "fp32"),
}
_LINEAR_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in ("scales", "lowrank", "alpha", "bias", "lowrank_a", "gate", "y")},
    **{f"{name}_ptr": "*i32" for name in ("sums", "partial", "arrived")},
    **dict.fromkeys(("rows", "rows_per_image", "N"), "i32"),
    **{"codes_ptr": "*i8", "planar_ptr": "*u8"},
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
    yield from _attentions(architecture)
    yield Case(
        "dense_linear, final layer",
        dense_linear.dense_linear_kernel,
        dense_linear.SIGNATURE,
        {"K": 1152, "N": 32},
        dense_linear.CONFIG,
    )


def _rotations() -> Iterator[Case]:
    """In front of qkv and fc1, of proj and of fc2, which read bfloat16 unless activations are float32, and of adaLN."""
    for width, kind, block, name, types in (
        (1152, rotate_quantize.MODULATE, None, "LayerNorm, 1152", {}),
        (1152, rotate_quantize.MODULATE, 128, "LayerNorm, 1152 in blocks of 128", {}),
        (1152, rotate_quantize.SILU, None, "SiLU, 1152", {}),
        (1152, rotate_quantize.NO_PROLOGUE, None, "1152, from bf16", {"x_ptr": _BF16}),
        (4608, rotate_quantize.NO_PROLOGUE, None, "4608, from bf16", {"x_ptr": _BF16}),
        (1152, rotate_quantize.NO_PROLOGUE, None, "1152", {}),
        (4608, rotate_quantize.NO_PROLOGUE, None, "4608", {}),
    ):
        yield Case(
            f"rotate_quantize, {name}",
            rotate_quantize.rotate_quantize_kernel,
            {**_ROTATE_TYPES, **types},
            rotate_quantize.constants(width, RANK, kind, True, block),
            rotate_quantize.default_config(width),
        )


def _products(architecture: int) -> Iterator[Case]:
    """8 images and 1: qkv, proj and fc2 into the residual, fc1 with its GELU; and adaLN of all blocks at once."""
    plain, gelu, add = ternary_linear.PLAIN, ternary_linear.GELU, ternary_linear.ADD
    for rows, width, outputs, epilogue, name, types in (
        (2048, 1152, 3456, plain, "to bf16", {"y_ptr": _BF16}),
        (2048, 1152, 4608, gelu, "GELU, to bf16", {"y_ptr": _BF16}),
        (2048, 4608, 1152, add, "into the residual", {}),
        (256, 4608, 1152, add, "into the residual", {}),
        (256, 1152, 1152, add, "into the residual", {}),
        (2048, 1152, 3456, plain, "to float32", {}),
    ):
        config = ternary_linear.default_config(rows, outputs, width, RANK, architecture)
        kernel, fixed = ternary_linear.ternary_linear_kernel, ternary_linear.constants(width, RANK, epilogue, True)
        if ternary_linear.is_async(config):
            kernel, fixed = async_linear_kernel, ternary_linear.async_constants(width, RANK, epilogue)
        yield Case(
            f"ternary_linear, {rows} rows, {width} x {outputs}, {name}",
            *(kernel, {**_LINEAR_TYPES, **types}, fixed, config),
            multiples_of_16=("N",),
        )
    yield Case(
        "ternary_linear, adaLN of all blocks",
        ternary_linear.ternary_linear_kernel,
        _LINEAR_TYPES,
        ternary_linear.constants(1152, RANK, plain, False),
        ternary_linear.group_config(architecture),
        multiples_of_16=("N",),
    )


def _attentions(architecture: int) -> Iterator[Case]:
    """Of 256 tokens, which one kernel takes on 9.0."""
    fixed = attention.constants(HEAD_DIM)
    for ends, types in (("", {}), (", bf16", {"qkv_ptr": _BF16, "out_ptr": _BF16})):
        if attention.is_short(HEAD_DIM, attention.SHORT_LENGTH, architecture):
            yield Case(
                f"short attention, {HEAD_DIM}{ends}",
                attention.short_attention_kernel,
                {**attention.SIGNATURE, **types},
                attention.short_constants(HEAD_DIM, attention.SHORT_LENGTH),
                attention.short_config(attention.SHORT_LENGTH),
            )
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
