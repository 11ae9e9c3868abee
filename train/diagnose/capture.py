"""The inputs of every quantised layer while a model runs: by hooks on a plain or fake-quantised one, through the
reference backend on a packed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import Checkpoint
from robuq_core.config import QuantConfig
from robuq_core.kernels.ops import Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import LAYERS, PackedDiT
from robuq_core.models.quant_linear import QuantLinear, layer_bits, layer_rotation_block, quantizable_linears
from robuq_core.quant.choices import ActivationRule, Grid
from robuq_core.quant.hadamard import Rotation, random_signs
from robuq_core.quant.packing import unpack_planar
from robuq_core.quant.ternary import ternary_fake_quantize

Observe = Callable[[str, Tensor], None]
Weights = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerInput:
    """How a layer treats its input of ``width`` values a token.

    ``weights``: made when called, ``[out, width]`` in the rotated basis: the part that sees quantised activations, and
    the whole weight, low-rank branch included.
    """

    width: int
    rotation: Rotation
    bits: int
    grid: Grid
    rule: ActivationRule
    weights: Weights


def layer_inputs(model: DiT, quant: QuantConfig) -> dict[str, LayerInput]:
    """Of every block linear, by name. Of a model in full precision: what ``quant`` would make of it."""
    found = {}
    generator = torch.Generator().manual_seed(quant.seed)
    for name, linear in quantizable_linears(model):
        if isinstance(linear, QuantLinear):
            width = linear.rotation.width
            weights = partial(_student_weights, linear)
            found[name] = LayerInput(width, linear.rotation, linear.bits, linear.grid, linear.activation, weights)
        elif isinstance(linear, nn.Linear):
            width = linear.in_features
            block = layer_rotation_block(name, quant)
            rotation = Rotation(width, random_signs(width, generator), block).to(linear.weight.device)
            weights = partial(_teacher_weights, linear, rotation)
            found[name] = LayerInput(width, rotation, layer_bits(name, quant), quant.grid, quant.activation, weights)
    return found


@torch.no_grad()
def _teacher_weights(linear: nn.Linear, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Without the low-rank branch that quantisation would split off."""
    weight = rotation(linear.weight)
    return weight, weight


@torch.no_grad()
def _student_weights(linear: QuantLinear) -> tuple[Tensor, Tensor]:
    ternary = ternary_fake_quantize(linear.weight, linear.weight_scale, linear.weight_planes)
    return ternary, ternary + linear.lowrank_a @ linear.lowrank_b


def _packed_weights(layer: TernaryLayer) -> tuple[Tensor, Tensor]:
    ternary = torch.zeros(layer.out_features, layer.in_features)
    for plane in (layer, *layer.finer):
        ternary += unpack_planar(plane.planar, layer.in_features).float() * plane.alpha[:, None]
    return ternary, ternary + layer.lowrank_a @ layer.lowrank_b


@contextmanager
def observed(model: DiT, observe: Observe, observe_qkv: Observe | None = None) -> Iterator[None]:
    """While it lasts, every forward of ``model`` calls ``observe(layer, tokens [M, K])`` for each block linear, and
    ``observe_qkv(layer, qkv [B, L, 3 D])`` with what each qkv gives."""

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        observe(name, inputs[0].flatten(0, -2))

    def keep_qkv(name: str, module: nn.Module, inputs: tuple[Any, ...], qkv: Tensor) -> None:
        if observe_qkv is not None:
            observe_qkv(name, qkv)

    handles = [linear.register_forward_pre_hook(partial(keep, name)) for name, linear in quantizable_linears(model)]
    for name, linear in quantizable_linears(model):
        if name.endswith(".qkv"):
            handles.append(linear.register_forward_hook(partial(keep_qkv, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ObservedBackend(ReferenceBackend):
    """The reference backend; calls ``observe(layer, tokens [M, K])`` with what each layer is about to rotate, and
    ``observe_qkv(layer, qkv [B, L, 3 D])`` with what each attention is about to take."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.names: dict[int, str] = {}
        self.observe: Observe = lambda name, tokens: None
        self.observe_qkv: Observe = lambda name, qkv: None
        self._latest = ""

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        self._latest = self.names[id(layer)]
        self.observe(self._latest, apply_prologue(x, prologue))
        return super().rotate_quantize(x, layer, prologue)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        self.observe_qkv(self._latest, qkv)
        return super().attention(qkv, num_heads, quantized)


def observed_packed(checkpoint: Checkpoint) -> tuple[PackedDiT, ObservedBackend, dict[str, LayerInput]]:
    """A packed model on a backend that can be listened to, and how its layers treat their inputs."""
    header, backend = checkpoint.header, ObservedBackend()
    is_quantized = header.quant.attention_bits is not None
    model = PackedDiT(header.model, checkpoint.dense, checkpoint.layers, backend, is_quantized)
    inputs = {}
    for i, block in enumerate(model.blocks):
        for part, layer in zip(LAYERS, block.layers, strict=True):
            name = f"blocks.{i}.{part}"
            backend.names[id(layer)] = name
            rotation = Rotation(layer.in_features, layer.signs, layer.rotation_block)
            weights = partial(_packed_weights, layer)
            inputs[name] = LayerInput(layer.in_features, rotation, layer.bits, layer.grid, "gaussian", weights)
    return model, backend, inputs
