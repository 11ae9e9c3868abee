"""The op set as ``torch.library`` operators, for tracers: torch.compile and torch.export see each op as one node.

Eager code calls a backend directly and pays nothing for this. To trace a network, give it a wrapped backend::

    network = packed.replica(TraceableBackend(packed.backend))
    compiled = torch.compile(network.denoise, fullgraph=True)

A packed layer enters an operator as its six tensors in the order of :class:`~robuq_core.kernels.ops.TernaryLayer`, its
bits, its grid and its rotation block (0 for the whole width); a backend as the key under which it is registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from robuq_core.kernels.ops import Backend, Modulation, NarrowBackend, Prologue, Quantized, TernaryLayer
from robuq_core.quant.choices import Grid

_BACKENDS: WeakValueDictionary[str, Backend] = WeakValueDictionary()
_KEYS = itertools.count()
_LOWRANK_B = 5


class TraceableBackend:
    """A :class:`~robuq_core.kernels.ops.Backend` behind operators: the same results, opaque to tracers."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.device = backend.name, backend.device
        if isinstance(backend, NarrowBackend):
            self.activations = backend.activations
        self._backend = backend
        self._key = f"{backend.name}#{next(_KEYS)}"
        _BACKENDS[self._key] = backend

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        if isinstance(prologue, Modulation):
            kind, modulation, eps = "modulation", [prologue.shift, prologue.scale], prologue.eps
        else:
            kind, modulation, eps = prologue or "", [], 0.0
        block = layer.rotation_block or 0
        return Quantized(
            *rotate_quantize(x, _tensors(layer), layer.bits, layer.grid, block, kind, modulation, eps, self._key)
        )

    def ternary_linear(
        self, x: Quantized, layer: TernaryLayer, dtype: torch.dtype = torch.float32, gelu: bool = False
    ) -> Tensor:
        parts = [x.codes, x.scales, x.lowrank]
        return ternary_linear(parts, _tensors(layer), layer.bits, layer.grid, dtype, gelu, self._key)  # type: ignore[no-any-return]

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        return attention(qkv, num_heads, quantized, self._key)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias, self._key)  # type: ignore[no-any-return]


def _tensors(layer: TernaryLayer) -> list[Tensor]:
    return [layer.planar, layer.alpha, layer.bias, layer.signs, layer.lowrank_a, layer.lowrank_b]


def _layer(tensors: Sequence[Tensor], bits: int, grid: str, block: int = 0) -> TernaryLayer:
    planar, alpha, bias, signs, lowrank_a, lowrank_b = tensors
    return TernaryLayer(planar, alpha, bias, signs, lowrank_a, lowrank_b, bits, cast(Grid, grid), block or None)


@torch.library.custom_op("robuq::rotate_quantize", mutates_args=())
def rotate_quantize(
    x: Tensor,
    layer: Sequence[Tensor],
    bits: int,
    grid: str,
    rotation_block: int,
    prologue: str,
    modulation: Sequence[Tensor],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [M, K]`` -> codes int8 ``[M, K]``, scales ``[M]``, low rank ``[M, r]``.

    ``prologue``: ``modulation`` (then ``modulation`` is shift and scale), ``gelu``, ``silu`` or empty.
    """
    chosen = cast(Prologue, prologue or None)
    if prologue == "modulation":
        shift, scale = modulation
        chosen = Modulation(shift, scale, eps)
    result = _BACKENDS[backend].rotate_quantize(x, _layer(layer, bits, grid, rotation_block), chosen)
    return result.codes, result.scales, result.lowrank


@rotate_quantize.register_fake
def _rotate_quantize_shapes(
    x: Tensor, layer: Sequence[Tensor], *_: object, **__: object
) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales, scales.new_empty(len(scales), layer[_LOWRANK_B].shape[0])


@torch.library.custom_op("robuq::ternary_linear", mutates_args=())
def ternary_linear(
    quantized: Sequence[Tensor],
    layer: Sequence[Tensor],
    bits: int,
    grid: str,
    dtype: torch.dtype,
    gelu: bool,
    backend: str,
) -> Tensor:
    """``quantized`` is what :func:`rotate_quantize` gives -> ``[M, N]``.

    ``dtype``: float32, or what a :class:`~robuq_core.kernels.ops.NarrowBackend` rounds to, after ``gelu``.
    """
    x, chosen = Quantized(*quantized), _BACKENDS[backend]
    if isinstance(chosen, NarrowBackend):
        return chosen.ternary_linear(x, _layer(layer, bits, grid), dtype, gelu)
    return chosen.ternary_linear(x, _layer(layer, bits, grid))


@ternary_linear.register_fake
def _ternary_linear_shape(
    quantized: Sequence[Tensor], layer: Sequence[Tensor], bits: int, grid: str, dtype: torch.dtype, *_: object
) -> Tensor:
    codes, scales, _lowrank = quantized
    return scales.new_empty(codes.shape[0], layer[0].shape[0], dtype=dtype)


@torch.library.custom_op("robuq::attention", mutates_args=())
def attention(qkv: Tensor, num_heads: int, quantized: bool, backend: str) -> Tensor:
    """``qkv [B, L, 3 D]`` -> ``[B, L, D]``."""
    return _BACKENDS[backend].attention(qkv, num_heads, quantized).contiguous()


@attention.register_fake
def _attention_shape(qkv: Tensor, *_: object, **__: object) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op("robuq::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    """``x [M, K] @ weight [N, K]^T + bias [N]`` -> ``[M, N]``."""
    return _BACKENDS[backend].linear(x, weight, bias)


@linear.register_fake
def _linear_shape(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
