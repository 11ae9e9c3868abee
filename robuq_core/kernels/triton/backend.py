"""The op set on an NVIDIA GPU: checks, then launches the kernels beside this file."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.errors import UserError
from robuq_core.kernels.ops import LayerGroup, Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.triton import attention as attention_kernels
from robuq_core.kernels.triton import dense_linear, rotate_quantize, ternary_linear, tuning
from robuq_core.kernels.triton.config import LaunchConfig, checked, emulated_architecture
from robuq_core.kernels.triton.rotation import rotation_matrices
from robuq_core.kernels.triton.weights import Weights, weights_of

MIN_CAPABILITY = (8, 0)
# What kernels hand to each other.
ACTIVATIONS_VARIABLE = "ROBUQ_ACTIVATIONS"
_ACTIVATIONS = (torch.float32, torch.bfloat16)


class TritonUnavailableError(UserError, RuntimeError):
    """There is no GPU that the kernels run on."""


def _architecture(device: torch.device) -> int:
    """Compute capability of ``device``, 90 for 9.0.

    Raises:
        TritonUnavailableError: it is no CUDA device, torch finds none, or it is too old.
    """
    if device.type != "cuda":
        raise TritonUnavailableError(f"the triton backend does not run on {device}: choose device cuda, or backend cpu")
    if not torch.cuda.is_available():
        raise TritonUnavailableError(
            "the triton backend needs an NVIDIA GPU and a CUDA build of torch, and torch finds neither: "
            "choose backend cpu or auto"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < MIN_CAPABILITY:
        raise TritonUnavailableError(
            f"the triton backend needs compute capability 8.0, {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}: choose backend reference"
        )
    return 10 * major + minor


def _chosen_activations() -> torch.dtype:
    name = os.environ.get(ACTIVATIONS_VARIABLE) or "bfloat16"
    if name not in ("bfloat16", "float32"):
        raise UserError(f"{ACTIVATIONS_VARIABLE} must be bfloat16 or float32, not {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _checked_activations(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _ACTIVATIONS:
        raise ValueError(f"activations must be {' or '.join(map(str, _ACTIVATIONS))}, not {dtype}")
    return dtype


class TritonBackend:
    """See :class:`robuq_core.kernels.ops.NarrowBackend`, ``FusedBackend`` and ``GroupingBackend``.

    Where a Triton driver for CPU tensors is active (the emulator of the tests), it runs on the CPU.

    One thread at a time may use an object, on one stream: parts of split products are counted in a buffer of its own.

    Args:
        activations: bfloat16, or float32 for twice the traffic; None takes :data:`ACTIVATIONS_VARIABLE`, else bfloat16.

    Raises:
        ValueError: ``activations`` of another dtype.
        TritonUnavailableError: no GPU of compute capability 8.0 or later.
        TuningTableError: the GPU's table of launch shapes cannot be read.
        UserError: the variable holds another dtype.
    """

    rows_at_once = 2**31  # a GPU wants all rows at once

    def __init__(self, device: torch.device | str | None = None, activations: torch.dtype | None = None) -> None:
        self.activations = _chosen_activations() if activations is None else _checked_activations(activations)
        self._tuned: tuning.Table = {}
        emulated = emulated_architecture()
        if emulated is not None:
            self.device, self.architecture = torch.device("cpu"), emulated
            self.name = f"triton-sm{emulated}-emulated"
        else:
            self.device = torch.device("cuda" if device is None else device)
            self.architecture = _architecture(self.device)
            self.name = f"triton-sm{self.architecture}"
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            self._tuned = tuning.load_table(torch.cuda.get_device_name(self.device))
        self._arrived = torch.zeros(ternary_linear.MAX_SPLIT_TILES, dtype=torch.int32, device=self.device)
        # What graphs hold the addresses of: by width and block, and by id of a layer for as long as it lives.
        self._rotations: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        self._weights: dict[int, Weights] = {}

    def _weights_of(self, layer: TernaryLayer | LayerGroup) -> Weights:
        found = self._weights.get(id(layer))
        if found is None:
            first = layer.layers[0] if isinstance(layer, LayerGroup) else layer
            key = first.in_features, first.rotation_block
            if key not in self._rotations:
                left, right = rotation_matrices(*key)
                self._rotations[key] = left.to(self.device), right.to(self.device)
            found = self._weights[id(layer)] = weights_of(layer, *self._rotations[key])
            weakref.finalize(layer, self._weights.pop, id(layer), None).atexit = False
        return found

    def _checked(self, tensor: Tensor, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Float32 unless ``dtypes`` are given."""
        return checked(tensor, name, shape, self.device, *(dtypes or (torch.float32,)))

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        return self._rotate_quantize(x, self._weights_of(layer), prologue)

    def _rotate_quantize(self, x: Tensor, weights: Weights, prologue: Prologue) -> Quantized:
        shape = x.shape[0], weights.shape[1]
        x = self._checked(x, "x", shape, *_ACTIVATIONS)
        if isinstance(prologue, Modulation):
            shape = _images(prologue.shift, shape[0]), shape[1]
            shift, scale = self._checked(prologue.shift, "shift", shape), self._checked(prologue.scale, "scale", shape)
            prologue = Modulation(shift, scale, prologue.eps)
        elif prologue not in (None, "gelu", "silu"):
            raise ValueError(f"prologue must be a Modulation, 'gelu', 'silu' or None, not {prologue!r}")
        return rotate_quantize.rotate_quantize(x, weights, prologue)

    def ternary_linear(
        self,
        x: Quantized,
        layer: TernaryLayer,
        dtype: torch.dtype = torch.float32,
        gelu: bool = False,
        config: LaunchConfig | None = None,
    ) -> Tensor:
        """As of :class:`~robuq_core.kernels.ops.NarrowBackend`; ``config``: a launch shape to try."""
        weights, rows = self._weights_of(layer), x.codes.shape[0]
        _, width, rank = weights.shape
        codes = self._checked(x.codes, "codes", (rows, width), torch.int8)
        scales, lowrank = self._checked(x.scales, "scales", (rows,)), self._checked(x.lowrank, "lowrank", (rows, rank))
        epilogue = ternary_linear.GELU if gelu else ternary_linear.PLAIN
        named = {"dtype": _checked_activations(dtype), "epilogue": epilogue}
        return self._product(Quantized(codes, scales, lowrank, x.sums), weights, config, **named)

    def _product(self, x: Quantized, weights: Weights, config: LaunchConfig | None = None, **named: Any) -> Tensor:
        sums = x.codes.sum(-1, dtype=torch.int32) if x.sums is None else x.sums
        if weights.lead:
            config = ternary_linear.group_config(self.architecture)
        elif config is None:
            size = x.codes.shape[-2], *weights.shape
            measured = self._tuned.get(tuning.ternary_linear_key(*size))
            config = measured or ternary_linear.default_config(*size, self.architecture)
        return ternary_linear.ternary_linear(x, sums, weights, config, self._arrived, **named)

    def ternary(self, x: Tensor, layer: TernaryLayer | LayerGroup, prologue: Prologue = None) -> Tensor:
        weights = self._weights_of(layer)
        return self._product(self._rotate_quantize(x, weights, prologue), weights)

    def ternary_each(self, x: Tensor, group: LayerGroup, prologue: Prologue = None) -> Tensor:
        return self.ternary(x, group, prologue)

    def add_ternary(
        self, residual: Tensor, gate: Tensor, x: Tensor, layer: TernaryLayer, prologue: Prologue = None
    ) -> None:
        weights, rows = self._weights_of(layer), x.shape[0]
        gate = self._checked(gate, "gate", (_images(gate, rows), weights.shape[0]))
        if self._checked(residual, "residual", (rows, weights.shape[0])) is not residual:
            raise ValueError("residual must be contiguous: it is changed in place")
        quantized = self._rotate_quantize(x, weights, prologue)
        self._product(quantized, weights, epilogue=ternary_linear.ADD, gate=gate, residual=residual)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        images, length, triple = qkv.shape
        width = triple // 3
        if num_heads < 1 or triple != 3 * width or width % num_heads:
            raise ValueError(f"qkv of width {triple} does not split into q, k, v of {num_heads} heads")
        qkv = self._checked(qkv, "qkv", (images, length, triple), *_ACTIVATIONS)
        if quantized:
            return attention_kernels.attention(qkv, num_heads, self.architecture)
        # Image by image: a library's choice of algorithm, and so its rounding, may depend on how many there are.
        out = torch.empty(images, length, width, dtype=qkv.dtype, device=qkv.device)
        for image, result in zip(qkv, out, strict=True):
            q, k, v = image.float().reshape(length, 3, num_heads, -1).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            result.copy_(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(length, width))
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs, width = weight.shape
        x = self._checked(x, "x", (x.shape[0], width))
        weight = self._checked(weight, "weight", (outputs, width))
        return dense_linear.dense_linear(x, weight, self._checked(bias, "bias", (outputs,)))


def _images(modulation: Tensor, rows: int) -> int:
    images = modulation.shape[0]
    if images == 0 or rows % images:
        raise ValueError(f"{rows} rows do not divide among {images} images")
    return images
