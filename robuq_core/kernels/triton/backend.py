"""The op set on an NVIDIA GPU: checks, then launches the kernels beside this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.errors import UserError
from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.triton import attention as attention_kernels
from robuq_core.kernels.triton import dense_linear, rotate_quantize, ternary_linear, tuning
from robuq_core.kernels.triton.config import checked, emulated_architecture

MIN_CAPABILITY = (8, 0)
_PROLOGUES = ("gelu", "silu")
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


def _checked_activations(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _ACTIVATIONS:
        raise ValueError(f"activations must be {' or '.join(map(str, _ACTIVATIONS))}, not {dtype}")
    return dtype


class TritonBackend:
    """See :class:`robuq_core.kernels.ops.NarrowBackend`.

    Where a Triton driver for CPU tensors is active (the emulator of the tests), it runs on the CPU.

    Args:
        activations: float32, or bfloat16 for less traffic; not the default while no GPU has measured it.

    Raises:
        ValueError: ``activations`` of another dtype.
        TritonUnavailableError: no GPU of compute capability 8.0 or later.
        TuningTableError: the GPU's table of launch shapes cannot be read.
    """

    def __init__(self, device: torch.device | str | None = None, activations: torch.dtype = torch.float32) -> None:
        self.activations = _checked_activations(activations)
        emulated = emulated_architecture()
        if emulated is not None:
            self.device, self.architecture = torch.device("cpu"), emulated
            self.name, self._tuned = f"triton-sm{emulated}-emulated", tuning.Table()
            return
        self.device = torch.device("cuda" if device is None else device)
        self.architecture = _architecture(self.device)
        self.name = f"triton-sm{self.architecture}"
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._tuned = tuning.load_table(torch.cuda.get_device_name(self.device))

    def _checked(self, tensor: Tensor, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Float32 unless ``dtypes`` are given."""
        return checked(tensor, name, shape, self.device, *(dtypes or (torch.float32,)))

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        rows, width = x.shape[0], layer.in_features
        x = self._checked(x, "x", (rows, width), *_ACTIVATIONS)
        config = rotate_quantize.default_config(width)
        return rotate_quantize.rotate_quantize(x, layer, self._prologue(prologue, rows, width), config)

    def _prologue(self, prologue: Prologue, rows: int, width: int) -> Prologue:
        if isinstance(prologue, Modulation):
            images = prologue.shift.shape[0]
            if images == 0 or rows % images:
                raise ValueError(f"{rows} rows do not divide among {images} images")
            shift = self._checked(prologue.shift, "shift", (images, width))
            scale = self._checked(prologue.scale, "scale", (images, width))
            return Modulation(shift, scale, prologue.eps)
        if prologue is not None and prologue not in _PROLOGUES:
            raise ValueError(f"prologue must be a Modulation, 'gelu', 'silu' or None, not {prologue!r}")
        return prologue

    def ternary_linear(self, x: Quantized, layer: TernaryLayer, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = x.codes.shape[0]
        codes = self._checked(x.codes, "codes", (rows, layer.in_features), torch.int8)
        scales = self._checked(x.scales, "scales", (rows,))
        lowrank = self._checked(x.lowrank, "lowrank", (rows, layer.rank))
        key = tuning.ternary_linear_key(rows, layer.out_features, layer.in_features, layer.rank)
        config = self._tuned.get(key) or ternary_linear.default_config(rows, layer.out_features, self.architecture)
        dtype = _checked_activations(dtype)
        return ternary_linear.ternary_linear(Quantized(codes, scales, lowrank), layer, config, dtype=dtype)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        images, length, triple = qkv.shape
        width = triple // 3
        if num_heads < 1 or triple != 3 * width or width % num_heads:
            raise ValueError(f"qkv of width {triple} does not split into q, k, v of {num_heads} heads")
        qkv = self._checked(qkv, "qkv", (images, length, triple), *_ACTIVATIONS)
        if quantized:
            return attention_kernels.attention(qkv, num_heads)
        # Picture by picture: a library's choice of algorithm, and so its rounding, may depend on how many there are.
        out = torch.empty(images, length, width, dtype=qkv.dtype, device=qkv.device)
        for picture, result in zip(qkv, out, strict=True):
            q, k, v = picture.float().reshape(length, 3, num_heads, -1).permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            result.copy_(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(length, width))
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs, width = weight.shape
        x = self._checked(x, "x", (x.shape[0], width))
        weight = self._checked(weight, "weight", (outputs, width))
        return dense_linear.dense_linear(x, weight, self._checked(bias, "bias", (outputs,)))
