"""What every backend offers: the packed layer, and the four ops that a packed DiT is made of.

Each output row depends on its own input row alone, in one fixed order of float operations: a row's result does not
change with the number of rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.quant.choices import Grid


@dataclass(frozen=True)
class TernaryLayer:
    """A packed linear, eq. (1)-(5). N outputs, K inputs, r the rank of the low-rank branch (may be 0).

    ``planar``: ternary codes, 2 bits each (see :mod:`robuq_core.quant.packing`), uint8 ``[N, ceil(K / 128) * 32]``.
    ``alpha [N]``, ``bias [N]``, ``signs [K]``: float32. ``lowrank_a [N, r]``, ``lowrank_b [r, K]``: bfloat16. All are
    contiguous.
    ``bits``, ``grid``: of its input's activation quantiser. ``rotation_block``: see
    :func:`robuq_core.quant.hadamard.rotation_factors`. ``extra_planes``: further planes of the weight
    (:func:`robuq_core.quant.ternary.ternary_planes`), layers of rank 0 without bias whose outputs for the same codes
    are added.
    """

    planar: Tensor
    alpha: Tensor
    bias: Tensor
    signs: Tensor
    lowrank_a: Tensor
    lowrank_b: Tensor
    bits: int
    grid: Grid
    rotation_block: int | None = None
    extra_planes: tuple[TernaryLayer, ...] = ()

    @property
    def in_features(self) -> int:
        return self.signs.shape[0]

    @property
    def out_features(self) -> int:
        return self.alpha.shape[0]

    @property
    def rank(self) -> int:
        return self.lowrank_a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors()) + sum(plane.nbytes for plane in self.extra_planes)

    def to(self, device: torch.device) -> TernaryLayer:
        """The layer on ``device``; its tensors are shared where they lie there already."""
        moved = self.with_tensors([tensor.to(device) for tensor in self.tensors()])
        return replace(moved, extra_planes=tuple(plane.to(device) for plane in self.extra_planes))

    def tensors(self) -> tuple[Tensor, ...]:
        """Its own, without those of further planes."""
        return self.planar, self.alpha, self.bias, self.signs, self.lowrank_a, self.lowrank_b

    def with_tensors(self, tensors: Sequence[Tensor]) -> TernaryLayer:
        """The same quantiser and rotation around other :meth:`tensors`."""
        planar, alpha, bias, signs, a, b = tensors
        return replace(self, planar=planar, alpha=alpha, bias=bias, signs=signs, lowrank_a=a, lowrank_b=b)


@dataclass(frozen=True)
class LayerGroup:
    """Equal layers that read one input, such as the modulations of every block.

    ``stacked``: their tensors, each with the layer as its first dimension. ``layers``: views of it.
    """

    layers: tuple[TernaryLayer, ...]
    stacked: TernaryLayer

    @staticmethod
    def of(layers: Sequence[TernaryLayer]) -> LayerGroup | None:
        """The group, which copies the tensors; ``None`` where layers differ in shape or quantiser, or have planes."""
        kinds = {
            (layer.bits, layer.grid, layer.rotation_block, *(t.shape for t in layer.tensors())) for layer in layers
        }
        if len(kinds) != 1 or any(layer.extra_planes for layer in layers):
            return None
        stacks = [torch.stack(tensors) for tensors in zip(*(layer.tensors() for layer in layers), strict=True)]
        views = tuple(layers[0].with_tensors(each) for each in zip(*stacks, strict=True))
        return LayerGroup(views, layers[0].with_tensors(stacks))


@dataclass(frozen=True)
class Modulation:
    """LayerNorm without parameters, then ``x * (1 + scale) + shift``; ``shift``, ``scale``: ``[B, K]`` for B images.

    Rows ``[M, K]`` belong to images in order, ``M / B`` tokens each.
    """

    shift: Tensor
    scale: Tensor
    eps: float


Prologue = Modulation | Literal["gelu", "silu"] | None


@dataclass(frozen=True)
class Quantized:
    """A layer's input as it enters the integer product: int8 ``codes [M, K]``, float32 ``scales [M]`` and
    ``lowrank [M, r]`` (the rotated, unquantised activation times ``lowrank_b^T``).

    ``sums``: int32 ``[M]``, of each row's codes, from backends that multiply weights plus one.
    """

    codes: Tensor
    scales: Tensor
    lowrank: Tensor
    sums: Tensor | None = None


class Backend(Protocol):
    """The op set. Tensors are float32 and contiguous unless said otherwise; shapes are checked by the backend.

    All tensors, weights included, lie on ``device``.
    """

    name: str
    device: torch.device

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        """Prologue (``gelu`` is the tanh form), rotation and per-token quantisation of ``x [M, K]``, eq. (1), (4)."""
        ...

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        """``y [M, N]``, eq. (5): exact int32 product, two scales, low-rank term, bias."""
        ...

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        """Softmax attention of ``qkv [B, L, 3 D]`` (q|k|v, heads within each) -> ``[B, L, D]``.

        ``quantized``: 8-bit products as :mod:`robuq_core.quant.attention` defines them.
        """
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Full-precision ``x [M, K] @ weight [N, K]^T + bias [N]``, invariant to M."""
        ...


@runtime_checkable
class NarrowBackend(Backend, Protocol):
    """A backend whose kernels can hand values to each other in bfloat16: half the traffic.

    Its ``rotate_quantize`` and ``attention`` read float32 or bfloat16, as exactly; attention gives what it reads.
    ``activations``: what it wants qkv, heads and the MLP's hidden values in, float32 or bfloat16. The hidden values
    are rounded after their GELU.
    """

    activations: torch.dtype

    def ternary_linear(
        self, x: Quantized, layer: TernaryLayer, dtype: torch.dtype = torch.float32, gelu: bool = False
    ) -> Tensor:
        """As of :class:`Backend`, then GELU (tanh form) if asked for; the float32 result is rounded to ``dtype`` once,
        to the nearest, ties to even."""
        ...


@runtime_checkable
class GroupingBackend(Backend, Protocol):
    """A backend that runs a group of layers on one input at once, with the same bits as one after the other."""

    def ternary_each(self, x: Tensor, group: LayerGroup, prologue: Prologue = None) -> Tensor:
        """``x [M, K]`` -> float32 ``[layers, M, N]``."""
        ...


@runtime_checkable
class FusedBackend(Backend, Protocol):
    """A backend that also runs a whole layer in one call, with the same bits as in two.

    ``rows_at_once``: more rows than these are better run one part after the other, so that what one op hands to the
    next stays in the caches.
    """

    rows_at_once: int

    def ternary(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Tensor:
        """``ternary_linear(rotate_quantize(x))``: ``x [M, K]`` -> ``[M, N]``."""
        ...

    def add_ternary(
        self, residual: Tensor, gate: Tensor, x: Tensor, layer: TernaryLayer, prologue: Prologue = None
    ) -> None:
        """``residual [M, N] += gate * ternary(x)`` in place; ``gate [B, N]`` for B images, M / B rows each."""
        ...


@dataclass(frozen=True, eq=False)
class Block:
    """The layers of a block of a network, D wide, all of one plane. ``eps``: of its two norms."""

    qkv: TernaryLayer
    proj: TernaryLayer
    fc1: TernaryLayer
    fc2: TernaryLayer
    num_heads: int
    quantized_attention: bool
    eps: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Ends:
    """The full-precision layers of a network before and behind its blocks, as pairs of weight and bias.

    ``embedder`` reads patches, ``last`` makes them, ``modulation`` gives the last one's shift and scale. ``position``:
    ``[L, D]``, added to the tokens. ``negated``: of the output.
    """

    embedder: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    modulation: tuple[Tensor, Tensor]
    position: Tensor
    patch: int
    in_channels: int
    out_channels: int
    negated: bool


@runtime_checkable
class NetworkBackend(Backend, Protocol):
    """A backend that runs each part of a network in one call."""

    def embed(self, images: Tensor, ends: Ends) -> Tensor:
        """Images ``[B, C, H, W]`` -> tokens ``[B, L, D]``."""
        ...

    def add_block(self, x: Tensor, modulation: Tensor, block: Block) -> None:
        """Adds both branches to ``x [B, L, D]`` in place, with the same bits as op by op. ``modulation [6, B, D]``:
        shift, scale and gate of the attention, then of the MLP."""
        ...

    def output(self, x: Tensor, modulation: Tensor, ends: Ends) -> Tensor:
        """LayerNorm, modulation ``[2, B, D]`` and the last layer: tokens -> images."""
        ...

    def modulate(self, c: Tensor, layers: Sequence[TernaryLayer], ends: Ends, table: Tensor, slots: Tensor) -> None:
        """Modulations of the conditions ``c [U, D]`` to ``table [6 len(layers) + 2, S, D]``, where the int64
        ``slots [U]`` say."""
        ...


class FusedLinear(Protocol):
    """A packed layer from its input: ``x [M, K]`` -> ``[M, N]``."""

    def __call__(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Tensor: ...


def fused_linear(backend: Backend, intermediate: bool = False, gelu: bool = False) -> FusedLinear:
    """How ``backend`` runs a whole layer: in one call where it can, else in two; further planes take one more each.

    ``intermediate``: the result goes into the next kernel, in the ``activations`` of a :class:`NarrowBackend`.
    Otherwise, and on other backends, it is float32. ``gelu``: of the result, before it is rounded.
    """
    narrow = backend if isinstance(backend, NarrowBackend) else None
    in_one_call = not gelu and (narrow is None or not intermediate)
    fused = backend.ternary if isinstance(backend, FusedBackend) and in_one_call else None
    dtype = narrow.activations if narrow is not None and intermediate else torch.float32

    def run(x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Tensor:
        if fused is not None and not layer.extra_planes:
            return fused(x, layer, prologue)
        quantized = backend.rotate_quantize(x, layer, prologue)
        if narrow is not None and not layer.extra_planes:
            return narrow.ternary_linear(quantized, layer, dtype, gelu)
        y = backend.ternary_linear(quantized, layer)
        bare = replace(quantized, lowrank=quantized.lowrank.new_empty(x.shape[0], 0))
        for plane in layer.extra_planes:
            y = y.add_(backend.ternary_linear(bare, plane))
        return (F.gelu(y, approximate="tanh") if gelu else y).to(dtype)

    return run
