"""The op set on the native library (``native/*.c``): fused rotation and quantisation, 2-bit weights decoded in cache.

Every output row comes from its own input row in one fixed order of operations: results do not depend on the number of
rows or threads. Each backend object has its own thread pool: two run side by side. Paths: ``avx2`` and ``plain``
(portable C), chosen at run time, or by ``ROBUQ_CPU_ISA``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from robuq_core.errors import UserError
from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix
from robuq_core.quant.packing import planar_width

Isa = Literal["avx2", "plain"]
ISA_VARIABLE = "ROBUQ_CPU_ISA"

# The native side's enumerations (native/robuq.h) and the number of its interface (native/module.c).
_INTERFACE = 2
_ISA_CODE: Mapping[Isa, int] = {"plain": 0, "avx2": 1}
_NO_PROLOGUE, _MODULATE, _GELU, _SILU = range(4)

_INT, _SIZE, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    # backend; x, rows, K; signs, H_base, base; prologue, shift, scale, rows per image, eps; B, r;
    # step per mean|x|, midrise, lowest code, highest code; codes, scales, low rank
    "robuq_rotate_quantize": [
        *(_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE),
        *(_INT, _POINTER, _POINTER, _SIZE, _FLOAT, _POINTER, _SIZE),
        *(_FLOAT, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER),
    ],
    # backend; codes, scales, low rank, rows, K; planar, alpha, bias, A, N, r; max |code|; y
    "robuq_ternary_linear": [
        *(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
        *(_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _INT, _POINTER),
    ],
    # backend; qkv, images, L, D, heads; quantized; out
    "robuq_attention": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _INT, _POINTER],
    # backend; x, weight, bias, rows, K, N; y
    "robuq_linear": [_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER],
}


class NativeUnavailableError(UserError, RuntimeError):
    """The native library is not built, or this processor lacks what was asked of it."""


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The native library with its signatures declared.

    Raises:
        NativeUnavailableError: it is not built, does not load, or is of another version of the source.
    """
    spec = importlib.util.find_spec("robuq_core.kernels._native")
    if spec is None or spec.origin is None:
        raise NativeUnavailableError(
            "the native CPU library is not built: install a C compiler and run `pip install -e .` again "
            "(or `python setup.py build_ext --inplace`), or choose the reference backend"
        )
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise NativeUnavailableError(f"the native CPU library {spec.origin} does not load: {error}") from error
    if not hasattr(library, "robuq_interface") or library.robuq_interface() != _INTERFACE:
        raise NativeUnavailableError(
            f"the native CPU library {spec.origin} was built from another version of the source: "
            "run `pip install -e .` again (or `python setup.py build_ext --inplace --force`)"
        )
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, _INT
    library.robuq_open.argtypes, library.robuq_open.restype = [_INT, _INT], _POINTER
    library.robuq_close.argtypes, library.robuq_close.restype = [_POINTER], None
    return library


def choose_isa(library: ctypes.CDLL, isa: str | None = None) -> Isa:
    """``isa``, else what :data:`ISA_VARIABLE` says, else the fastest path that this processor runs.

    Raises:
        ValueError: an unknown path. NativeUnavailableError: a path that this processor lacks.
    """
    wanted = isa or os.environ.get(ISA_VARIABLE) or None
    has_avx2 = bool(library.robuq_has_avx2())
    if wanted is None:
        return "avx2" if has_avx2 else "plain"
    if wanted == "plain":
        return "plain"
    if wanted != "avx2":
        raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(get_args(Isa))}, not {wanted!r}")
    if not has_avx2:
        raise NativeUnavailableError(f"this processor has no AVX2 with FMA: unset {ISA_VARIABLE} or set it to plain")
    return "avx2"


@lru_cache(maxsize=16)
def _base_matrix(width: int) -> Tensor:
    base, _ = decompose_order(width)
    return hadamard_matrix(base).float().contiguous()


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``tensor``, contiguous; the native side trusts what passes here."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {dtype} {shape} on the CPU, not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class CpuBackend:
    """See :class:`robuq_core.kernels.ops.Backend`.

    An object owns a thread pool, whose threads start with the first op and end with the object. Several Python threads
    may call one object, in turns; the ops of two objects run at the same time. A forked child may go on using both.

    Args:
        threads: the most that work on one op, the calling one among them; ``None`` takes torch's number.
        isa: ``avx2`` or ``plain``; ``None`` leaves the choice to :func:`choose_isa`.

    Raises:
        NativeUnavailableError: the library is not built, or the processor lacks ``isa``.
        ValueError: ``threads`` below 1, or an unknown ``isa``.
    """

    device = torch.device("cpu")

    def __init__(self, threads: int | None = None, isa: Isa | None = None) -> None:
        self._library = load_library()
        self.isa = choose_isa(self._library, isa)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        self.name = f"cpu-{self.isa}"
        self._handle = self._library.robuq_open(_ISA_CODE[self.isa], self.threads)
        if not self._handle:
            raise MemoryError("no memory for a thread pool")
        # At interpreter exit the process ends its threads itself: another Python thread may still be in an op.
        weakref.finalize(self, self._library.robuq_close, self._handle).atexit = False

    def __reduce__(self) -> tuple[type[CpuBackend], tuple[int, Isa]]:
        return type(self), (self.threads, self.isa)  # a copy has its own pool

    def _call(self, function: str, *arguments: object) -> None:
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        if getattr(self._library, function)(self._handle, *values):
            raise MemoryError(f"{function}: no memory for its working buffers")

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        rows, width, rank = x.shape[0], layer.in_features, layer.rank
        x = _check(x, "x", (rows, width))
        signs = _check(layer.signs, "signs", (width,))
        lowrank_b = _check(layer.lowrank_b, "lowrank_b", (rank, width))
        kind, shift, scale, rows_per_image, eps = _NO_PROLOGUE, None, None, 1, 0.0
        if isinstance(prologue, Modulation):
            images = prologue.shift.shape[0]
            if images == 0 or rows % images:
                raise ValueError(f"{rows} rows do not divide among {images} images")
            shift = _check(prologue.shift, "shift", (images, width))
            scale = _check(prologue.scale, "scale", (images, width))
            kind, rows_per_image, eps = _MODULATE, max(rows // images, 1), prologue.eps
        elif prologue is not None:
            if prologue not in ("gelu", "silu"):
                raise ValueError(f"prologue must be a Modulation, 'gelu', 'silu' or None, not {prologue!r}")
            kind = _GELU if prologue == "gelu" else _SILU
        midrise = is_midrise(layer.bits, layer.grid)
        top = 2**layer.bits - 1 if midrise else 2 ** (layer.bits - 1) - 1
        bottom = -top if midrise else -top - 1
        base = _base_matrix(width)
        codes = torch.empty(rows, width, dtype=torch.int8)
        scales, lowrank = torch.empty(rows), torch.empty(rows, rank)
        self._call(
            "robuq_rotate_quantize",
            *(x, rows, width, signs, base, base.shape[0]),
            *(kind, shift, scale, rows_per_image, eps, lowrank_b, rank),
            *(SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[layer.bits], midrise, bottom, top, codes, scales, lowrank),
        )
        return Quantized(codes, scales, lowrank)

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        rows, width, outputs, rank = x.codes.shape[0], layer.in_features, layer.out_features, layer.rank
        y = torch.empty(rows, outputs)
        self._call(
            "robuq_ternary_linear",
            _check(x.codes, "codes", (rows, width), torch.int8),
            _check(x.scales, "scales", (rows,)),
            _check(x.lowrank, "lowrank", (rows, rank)),
            *(rows, width),
            _check(layer.planar, "planar", (outputs, planar_width(width)), torch.uint8),
            _check(layer.alpha, "alpha", (outputs,)),
            _check(layer.bias, "bias", (outputs,)),
            _check(layer.lowrank_a, "lowrank_a", (outputs, rank)),
            *(outputs, rank, min(2**layer.bits - 1, 128), y),
        )
        return y

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        images, length, triple = qkv.shape
        width = triple // 3
        if num_heads < 1 or triple != 3 * width or width % num_heads:
            raise ValueError(f"qkv of width {triple} does not split into q, k, v of {num_heads} heads")
        out = torch.empty(images, length, width)
        qkv = _check(qkv, "qkv", (images, length, triple))
        self._call("robuq_attention", qkv, images, length, width, num_heads, quantized, out)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, width, outputs = x.shape[0], weight.shape[1], weight.shape[0]
        y = torch.empty(rows, outputs)
        self._call(
            "robuq_linear",
            _check(x, "x", (rows, width)),
            _check(weight, "weight", (outputs, width)),
            _check(bias, "bias", (outputs,)),
            *(rows, width, outputs, y),
        )
        return y
