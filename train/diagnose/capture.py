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

Observe = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class LayerInput:
    """How a layer treats its input of ``width`` values a token."""

    width: int
    rotation: Rotation
    bits: int
    grid: Grid
    rule: ActivationRule


def layer_inputs(model: DiT, quant: QuantConfig) -> dict[str, LayerInput]:
    """Of every block linear, by name. Of a model in full precision: what ``quant`` would make of it."""
    found = {}
    generator = torch.Generator().manual_seed(quant.seed)
    for name, linear in quantizable_linears(model):
        if isinstance(linear, QuantLinear):
            width = linear.rotation.width
            found[name] = LayerInput(width, linear.rotation, linear.bits, linear.grid, linear.activation)
        elif isinstance(linear, nn.Linear):
            width = linear.in_features
            block = layer_rotation_block(name, quant)
            rotation = Rotation(width, random_signs(width, generator), block).to(linear.weight.device)
            found[name] = LayerInput(width, rotation, layer_bits(name, quant), quant.grid, quant.activation)
    return found


@contextmanager
def observed(model: DiT, observe: Observe) -> Iterator[None]:
    """While it lasts, every forward of ``model`` calls ``observe(layer, tokens [M, K])`` for each block linear."""

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        observe(name, inputs[0].flatten(0, -2))

    handles = [linear.register_forward_pre_hook(partial(keep, name)) for name, linear in quantizable_linears(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ObservedBackend(ReferenceBackend):
    """The reference backend; calls ``observe(layer, tokens [M, K])`` with what each layer is about to rotate."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.names: dict[int, str] = {}
        self.observe: Observe = lambda name, tokens: None

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        self.observe(self.names[id(layer)], apply_prologue(x, prologue))
        return super().rotate_quantize(x, layer, prologue)


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
            inputs[name] = LayerInput(layer.in_features, rotation, layer.bits, layer.grid, "gaussian")
    return model, backend, inputs
