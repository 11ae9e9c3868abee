"""The op set in plain torch, on any device: the law that every other backend is tested against.

Codes, scales and integer products are invariant to the number of rows as far as torch's own float matmul is; the
native backends hold that property to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.quant.activation import quantize_activation
from robuq_core.quant.attention import quantized_attention
from robuq_core.quant.hadamard import Rotation
from robuq_core.quant.packing import unpack_planar


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """``x [M, K]`` after the elementwise work in front of a layer, same shape."""
    if prologue is None:
        return x
    if isinstance(prologue, Modulation):
        images, width = prologue.shift.shape
        if images == 0 or x.shape[0] % images:
            raise ValueError(f"{x.shape[0]} rows do not divide among {images} images")
        normed = F.layer_norm(x, (width,), eps=prologue.eps).reshape(images, -1, width)
        return (normed * (1 + prologue.scale[:, None]) + prologue.shift[:, None]).reshape(x.shape)
    if prologue == "gelu":
        return F.gelu(x, approximate="tanh")
    if prologue == "silu":
        return F.silu(x)
    raise ValueError(f"prologue must be a Modulation, 'gelu', 'silu' or None, not {prologue!r}")


@lru_cache(maxsize=32)
def _rotation(width: int, block: int | None, device: torch.device) -> Rotation:
    """The rotation without its signs."""
    return Rotation(width, block=block).to(device)


class ReferenceBackend:
    """See :class:`robuq_core.kernels.ops.Backend`."""

    name = "reference"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @torch.no_grad()
    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        rotate = _rotation(layer.in_features, layer.rotation_block, x.device)
        rotated = rotate(apply_prologue(x, prologue) * layer.signs)
        codes, scales = quantize_activation(rotated, layer.bits, layer.grid)
        return Quantized(codes, scales.squeeze(-1), F.linear(rotated, layer.lowrank_b.float()))

    @torch.no_grad()
    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        # 128 K < 2^24: float32 holds every partial sum of the integer product exactly, in any order.
        weight = unpack_planar(layer.planar, layer.in_features).float()
        product = F.linear(x.codes.float(), weight)
        y = product * (x.scales[:, None] * layer.alpha)
        if layer.rank:
            y = y + F.linear(x.lowrank, layer.lowrank_a.float())
        return y + layer.bias

    @torch.no_grad()
    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        images, length, triple = qkv.shape
        width = triple // 3
        heads = qkv.reshape(images, length, 3, num_heads, width // num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attend = quantized_attention if quantized else F.scaled_dot_product_attention
        return attend(q, k, v).transpose(1, 2).reshape(images, length, width)

    @torch.no_grad()
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)


class NarrowReferenceBackend(ReferenceBackend):
    """The reference of activations in bfloat16; see :class:`robuq_core.kernels.ops.NarrowBackend`."""

    activations = torch.bfloat16

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        return super().rotate_quantize(x.float(), layer, prologue)

    def ternary_linear(
        self, x: Quantized, layer: TernaryLayer, dtype: torch.dtype = torch.float32, gelu: bool = False
    ) -> Tensor:
        y = super().ternary_linear(x, layer)
        return (F.gelu(y, approximate="tanh") if gelu else y).to(dtype)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        return super().attention(qkv.float(), num_heads, quantized).to(qkv.dtype)
