"""The linear layer of a fake-quantised DiT, eq. (1)-(5), and its swap for ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robuq_core.config import QuantConfig
from robuq_core.models.dit import Attention, DiT
from robuq_core.quant.activation import fake_quantize_activation
from robuq_core.quant.choices import ActivationRule, Grid, LowRankInit, WeightScale
from robuq_core.quant.hadamard import Rotation, random_signs, undo_rotation
from robuq_core.quant.lowrank import lowrank_split, round_to_storage
from robuq_core.quant.ternary import ternary_fake_quantize, ternary_planes


class QuantLinear(nn.Module):
    """``y = Q_w(R) Q_a(x_H) + A B x_H + bias``, eq. (5), in floating point with straight-through gradients.

    ``weight`` is the latent residual R ``[out, in]`` in the rotated basis; ``lowrank_a [out, r]`` and
    ``lowrank_b [r, in]`` multiply the rotated, unquantised activation.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        bits: int,
        grid: Grid,
        weight_scale: WeightScale,
        rank: int,
        signs: Tensor,
        rotation_block: int | None = None,
        activation: ActivationRule = "gaussian",
        lowrank_init: LowRankInit = "svd",
        generator: torch.Generator | None = None,
        weight_planes: int = 1,
    ) -> None:
        super().__init__()
        self.bits, self.grid, self.weight_scale, self.activation = bits, grid, weight_scale, activation
        self.weight_planes = weight_planes
        self.rotation = Rotation(linear.in_features, signs, rotation_block)
        rotated = self.rotation(linear.weight.detach().float())
        a, b, residual = lowrank_split(rotated, rank, lowrank_init, generator)
        self.weight = nn.Parameter(residual)
        self.lowrank_a, self.lowrank_b = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self._planes: tuple[Tensor, Tensor] | None = None  # see held_codes

    @property
    def rank(self) -> int:
        return self.lowrank_a.shape[1]

    def quantized(self) -> Tensor:
        """The quantised weight of the forward, ``[out, in]``."""
        return ternary_fake_quantize(self.weight, self.weight_scale, self.weight_planes, self._planes)

    @torch.no_grad()
    def planes(self) -> tuple[Tensor, Tensor]:
        """:meth:`quantized` as codes int8 ``[planes, out, in]`` and alpha float32 ``[planes, out]``."""
        return ternary_planes(self.weight.float(), self.weight_planes, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``, same dtype."""
        rotation = self.rotation
        with torch.no_grad():
            rotated = rotation(x)
            codes = fake_quantize_activation(rotated, self.bits, self.grid, self.activation)
        factors: tuple[Tensor, ...] = (self.lowrank_a, self.lowrank_b)
        factors = tuple(round_to_storage(each) if self.rank else each.detach() for each in factors)
        operands = (rotated, codes, self.quantized(), *factors, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            operands = tuple(each.to(torch.get_autocast_dtype(x.device.type)) for each in operands)
        return _Branches.apply(x, *operands, rotation.signs, rotation.left, rotation.right)  # type: ignore[no-any-return, no-untyped-call]


class _Branches(torch.autograd.Function):
    """``y = q W^T + (t B^T) A^T + bias`` for ``t``, the rotated ``x``, and ``q = Q_a(t)``.

    One product makes both summands, of ``[q, t B^T]`` with ``[W, A]``, and one makes both of their gradients: alone,
    those of the branch are thin products, bound by memory. The gradient passes straight through Q_a. Where there are
    more tokens than channels, the rotation is undone on the weight and not on every token's gradient:
    ``dx = dy ((W + A B) H^T D)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, q: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor,
                *rotation: Tensor) -> Tensor:  # fmt: skip
        if a.shape[1]:
            q, weight = torch.cat([q, F.linear(t, b)], dim=-1), torch.cat([weight, a], dim=1)
        ctx.save_for_backward(t, q, weight, b, *rotation)
        ctx.dtype = x.dtype
        return F.linear(q, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, q, weight, b, *rotation = ctx.saved_tensors
        width, tokens = t.shape[-1], grad.shape[:-1].numel()
        g, t, q = (each.reshape(tokens, each.shape[-1]) for each in (grad, t, q))
        ternary, a = weight[:, :width], weight[:, width:]
        if tokens > len(weight):
            undone = undo_rotation(ternary + a @ b, *rotation).to(g.dtype)
            dx, g_low = (g @ torch.cat([undone, a], dim=1)).tensor_split([width], dim=1)
        else:
            g_q, g_low = (g @ weight).tensor_split([width], dim=1)
            dx = undo_rotation(g_q + g_low @ b, *rotation)
        dx = dx.to(ctx.dtype).reshape(*grad.shape[:-1], width)
        d_weight, d_a = (g.T @ q).tensor_split([width], dim=1)
        return (dx, None, None, d_weight, d_a, g_low.T @ t, g.sum(0), *[None] * len(rotation))


@contextmanager
def held_codes(model: nn.Module) -> Iterator[None]:
    """Make the ternary codes of ``model``'s weights once, for all forwards inside: the weights must not change there.

    The same numbers as without, and int8 codes of every weight in memory.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    try:
        for layer in layers:
            layer._planes = layer.planes()
        yield
    finally:
        for layer in layers:
            layer._planes = None


def quantizable_linears(model: DiT) -> Iterator[tuple[str, nn.Module]]:
    """``(name, module)`` of every linear of the blocks in order: qkv, proj, fc1, fc2 and adaLN of each."""
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear | QuantLinear):
            yield name, module


def is_adaln(name: str) -> bool:
    return "adaLN_modulation" in name


def layer_bits(name: str, config: QuantConfig) -> int:
    """Activation bits of a layer: its entry in ``config.bits``, else the default of its kind."""
    return config.bits.get(name, config.adaln_bits if is_adaln(name) else config.activation_bits)


def layer_rank(name: str, config: QuantConfig) -> int:
    """Rank of a layer's low-rank branch."""
    return config.adaln_rank if is_adaln(name) else config.rank


def layer_rotation_block(name: str, config: QuantConfig) -> int | None:
    """Width of the blocks in which a layer's input is rotated: ``None``: the whole, 1: no rotation."""
    rotated = config.rotation == "all" or (config.rotation == "proj_fc2" and name.endswith((".proj", ".fc2")))
    return config.rotation_block if rotated else 1


def check_bits(config: QuantConfig, layers: Collection[str]) -> None:
    """Raise ValueError where ``config.bits`` names a layer that is not in ``layers``."""
    if unknown := sorted(config.bits.keys() - set(layers)):
        raise ValueError(f"quant.bits names layers that the model lacks: {', '.join(unknown)}")


class LinearQuantizer:
    """Quantises linears; call it in the order of the network, since the random signs depend on it."""

    def __init__(self, config: QuantConfig) -> None:
        self._config = config
        self._signs = torch.Generator().manual_seed(config.seed)
        # A separate generator: the signs do not depend on how the branch is initialised.
        self._factors = torch.Generator().manual_seed(config.seed + 1)

    def __call__(self, name: str, linear: nn.Linear) -> QuantLinear:
        config = self._config
        return QuantLinear(
            linear,
            bits=layer_bits(name, config),
            grid=config.grid,
            weight_scale=config.weight_scale,
            rank=layer_rank(name, config),
            signs=random_signs(linear.in_features, self._signs),
            rotation_block=layer_rotation_block(name, config),
            activation=config.activation,
            lowrank_init=config.lowrank_init,
            generator=self._factors,
            weight_planes=config.weight_planes,
        )


def quantize_model(model: DiT, config: QuantConfig) -> DiT:
    """Swap every block linear of ``model`` for a :class:`QuantLinear`, in place; returns it.

    Sign vectors are drawn from ``config.seed``. The embedders and the final layer stay in full precision.
    """
    linears = dict(quantizable_linears(model))
    check_bits(config, linears)
    quantize = LinearQuantizer(config)
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is quantised already")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantize(name, linear).to(linear.weight.device))
    for module in model.modules():
        if isinstance(module, Attention):
            module.quantized = config.attention_bits is not None
    return model
