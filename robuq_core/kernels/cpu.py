"""The op set on the native library (``native/*.c``): fused rotation and quantisation, 2-bit weights decoded in cache.

Every output row comes from its own input row in one fixed order of operations: results do not depend on the number of
rows or threads. Each backend object has its own thread pool: two run side by side. Paths: of x86-64 ``amx``,
``avx512bf16``, ``avx512vbmi``, ``avx512vnni`` and ``avx2``, of AArch64 ``i8mm``, ``dotprod`` and ``neon``, and
``plain`` (portable C), chosen at run time, or by ``ROBUQ_CPU_ISA``. ``avx512bf16`` rounds the operands of the
low-rank branch to bfloat16.

One file, since it is the whole boundary to the native library: structures, checks and calls of each op together.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from robuq_core.diffusion.update import RowStep
from robuq_core.errors import UserError
from robuq_core.kernels.ops import Block, Ends, Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.quant.activation import GAUSSIAN_STEP, SIGMA_PER_MEAN_ABS, is_midrise
from robuq_core.quant.hadamard import decompose_order, hadamard_matrix, rotation_factors
from robuq_core.quant.packing import planar_width

# Fastest first.
Isa = Literal["amx", "avx512bf16", "avx512vbmi", "avx512vnni", "avx2", "i8mm", "dotprod", "neon", "plain"]
ISA_VARIABLE = "ROBUQ_CPU_ISA"

# The native side's enumerations (native/robuq.h) and the number of its interface (native/module.c).
_INTERFACE = 15
_ISA_CODE: Mapping[Isa, int] = {
    **{"plain": 0, "avx2": 1, "avx512vnni": 2, "avx512vbmi": 3, "avx512bf16": 4, "amx": 5},
    **{"neon": 6, "dotprod": 7, "i8mm": 8},
}
_MODULATE = 1

_INT, _SIZE, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    # backend, layer; x, rows; prologue; codes, scales, low rank
    "robuq_rotate_quantize": [_POINTER, _POINTER, _POINTER, _SIZE, *[_POINTER] * 4],
    # backend, layer; codes, scales, low rank, rows; y
    "robuq_ternary_linear": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER],
    # backend, layer; x, rows; prologue; gate, its stride, rows per image; y
    "robuq_ternary": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER],
    # backend; qkv, images, L, D, heads; quantized; out
    "robuq_attention": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _INT, _POINTER],
    # backend, block; x, images, L; modulation, strides of its entries and images
    "robuq_block": [_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE],
    # backend; x, weight, bias, rows, K, N; y
    "robuq_linear": [_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER],
    # backend, ends; images, their number; tokens
    "robuq_embed": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER],
    # backend, ends; tokens, images; modulation, strides of its entries and images; images
    "robuq_output": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER],
    # backend, ends, layers, their number; c, rows; slots, table, stride of its entries
    "robuq_modulate": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE],
    # x, estimates, output, steps; rows, values of a row, of an output row, guided ones; clip; following, estimates
    "robuq_update": [*[_POINTER] * 4, *[_SIZE] * 4, _INT, _POINTER, _POINTER],
    # packed, N, K; planar
    "robuq_planar_from_base3": [_POINTER, _SIZE, _SIZE, _POINTER],
    # planar, N, bytes of a row; counts
    "robuq_weight_counts": [_POINTER, _SIZE, _SIZE, _POINTER],
}


class _LayerStruct(ctypes.Structure):
    """``struct layer`` of native/robuq.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("planar", "alpha", "bias", "signs", "lowrank_a", "lowrank_b")),
        *((name, _POINTER) for name in ("weight_counts", "base_matrix")),
        *((name, _SIZE) for name in ("width", "channels", "rank", "base", "block", "max_code")),
        ("step_factor", _FLOAT),
        *((name, ctypes.c_int32) for name in ("midrise", "lowest", "highest")),
    )


class _PrologueStruct(ctypes.Structure):
    """``struct prologue`` of native/module.c."""

    _fields_ = (
        *(("kind", _SIZE), ("rows_per_image", _SIZE), ("shift", _POINTER), ("scale", _POINTER)),
        *(("shift_stride", _SIZE), ("scale_stride", _SIZE), ("eps", _FLOAT)),
    )


class _BlockStruct(ctypes.Structure):
    """``struct block`` of native/module.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "proj", "fc1", "fc2")),
        *(("heads", _SIZE), ("quantized", _SIZE), ("eps1", _FLOAT), ("eps2", _FLOAT)),
    )


class _DenseStruct(ctypes.Structure):
    """``struct dense`` of native/module.c."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("channels", _SIZE), ("width", _SIZE))


class _EndsStruct(ctypes.Structure):
    """``struct ends`` of native/module.c."""

    _fields_ = (
        *((name, _DenseStruct) for name in ("embedder", "last", "modulation")),
        ("position", _POINTER),
        *((name, _SIZE) for name in ("side", "patch", "in_channels", "out_channels", "negated")),
        ("eps", _FLOAT),
    )


# ``struct row_step`` of native/update.h.
_ROW_STEP = struct.Struct("@P9f??2x")


_NO_MODULATION = {name: _PrologueStruct(kind) for name, kind in ((None, 0), ("gelu", 2), ("silu", 3))}


class NativeUnavailableError(UserError, RuntimeError):
    """The native library is not built, or this processor lacks what was asked of it."""


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The native library of this installation.

    Raises:
        NativeUnavailableError: it is not built, does not load, or is of another version of the source.
    """
    spec = importlib.util.find_spec("robuq_core.kernels._native")
    if spec is None or spec.origin is None:
        raise NativeUnavailableError(
            "the native CPU library is not built: install a C compiler and run `pip install -e .` again "
            "(or `python setup.py build_ext --inplace`), or choose the reference backend"
        )
    return open_library(spec.origin)


def open_library(path: str) -> ctypes.CDLL:
    """The native library at ``path`` with its signatures declared. Raises: as :func:`load_library`."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise NativeUnavailableError(f"the native CPU library {path} does not load: {error}") from error
    if not hasattr(library, "robuq_interface") or library.robuq_interface() != _INTERFACE:
        raise NativeUnavailableError(
            f"the native CPU library {path} was built from another version of the source: "
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
    for path in get_args(Isa):
        if wanted in (None, path) and library.robuq_supports(_ISA_CODE[path]):
            return path  # type: ignore[no-any-return]
    if wanted not in get_args(Isa):
        raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(get_args(Isa))}, not {wanted!r}")
    raise NativeUnavailableError(
        f"this processor, system or build has no {wanted}: unset {ISA_VARIABLE} or set it to plain"
    )


@lru_cache(maxsize=16)
def _base_matrix(order: int) -> Tensor:
    base, _ = decompose_order(order)
    return hadamard_matrix(base).float().contiguous()


def _check(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, apart: bool = False
) -> Tensor:
    """``tensor``, contiguous, or just each row of it where rows may lie ``apart``; the native side trusts what passes
    here."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {dtype} {shape} on the CPU, not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor if tensor.is_contiguous() or (apart and tensor.stride(-1) == 1) else tensor.contiguous()


def _weight_counts(planar: Tensor) -> Tensor:
    """int32 ``[2, N]``: how many weights of a channel are not 0, and how many are 1."""
    planar, counts = planar.contiguous(), torch.empty(2, planar.shape[0], dtype=torch.int32)
    load_library().robuq_weight_counts(planar.data_ptr(), *planar.shape, counts.data_ptr())
    return counts


class _NativeLayer:
    """A layer's tensors, checked once, and the struct that points at them."""

    def __init__(self, layer: TernaryLayer) -> None:
        inputs, outputs, rank, bits = layer.in_features, layer.out_features, layer.rank, layer.bits
        midrise = is_midrise(bits, layer.grid)
        top = 2**bits - 1 if midrise else 2 ** (bits - 1) - 1
        copies, _, _ = rotation_factors(inputs, layer.rotation_block)
        block = inputs // copies
        base = _base_matrix(block)
        self._tensors = (
            _check(layer.planar, "planar", (outputs, planar_width(inputs)), torch.uint8),
            _check(layer.alpha, "alpha", (outputs,)),
            _check(layer.bias, "bias", (outputs,)),
            _check(layer.signs, "signs", (inputs,)),
            _check(layer.lowrank_a, "lowrank_a", (outputs, rank), torch.bfloat16),
            _check(layer.lowrank_b, "lowrank_b", (rank, inputs), torch.bfloat16),
            _weight_counts(layer.planar),
            base,
        )
        self._struct = _LayerStruct(
            *(tensor.data_ptr() for tensor in self._tensors),
            *(inputs, outputs, rank, base.shape[0], block, min(2**bits - 1, 128)),
            *(SIGMA_PER_MEAN_ABS * GAUSSIAN_STEP[bits], midrise, -top if midrise else -top - 1, top),
        )
        self.address = ctypes.addressof(self._struct)
        self.inputs, self.outputs, self.rank = inputs, outputs, rank


# By id of the layer, for as long as it lives. Weights do not move, so an op need not look at them again.
_NATIVE_LAYERS: dict[int, _NativeLayer] = {}


def _native_layer(layer: TernaryLayer) -> _NativeLayer:
    native = _NATIVE_LAYERS.get(id(layer))
    if native is None:
        native = _NATIVE_LAYERS[id(layer)] = _NativeLayer(layer)
        weakref.finalize(layer, _NATIVE_LAYERS.pop, id(layer), None).atexit = False
    return native


_NATIVE_BLOCKS: weakref.WeakKeyDictionary[Block, _BlockStruct] = weakref.WeakKeyDictionary()


def _native_block(block: Block) -> _BlockStruct:
    """The struct and, in ``layers``, what it points at."""
    if (known := _NATIVE_BLOCKS.get(block)) is not None:
        return known
    layers = [_native_layer(layer) for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    width, hidden = layers[0].inputs, layers[2].outputs
    sizes = [(layer.inputs, layer.outputs) for layer in layers]
    if sizes != [(width, 3 * width), (width, width), (width, hidden), (hidden, width)] or width % block.num_heads:
        raise ValueError(f"layers of {sizes} and {block.num_heads} heads make no block")
    addresses = (layer.address for layer in layers)
    struct = _BlockStruct(*addresses, block.num_heads, block.quantized_attention, block.eps[0], block.eps[1])
    struct.layers = layers
    _NATIVE_BLOCKS[block] = struct
    return struct


_NATIVE_ENDS: weakref.WeakKeyDictionary[Ends, _EndsStruct] = weakref.WeakKeyDictionary()


def _native_ends(ends: Ends) -> _EndsStruct:
    """The struct; ``shapes``: of an image, of its tokens and of an image out."""
    if (known := _NATIVE_ENDS.get(ends)) is not None:
        return known
    length, width = ends.position.shape
    side, area = math.isqrt(length), ends.patch**2
    sizes = ((width, ends.in_channels * area), (ends.out_channels * area, width), (2 * width, width))
    dense = []
    for name, (channels, inputs) in zip(("embedder", "last", "modulation"), sizes, strict=True):
        weight, bias = getattr(ends, name)
        weight, bias = _check(weight, f"{name}.weight", (channels, inputs)), _check(bias, f"{name}.bias", (channels,))
        dense.append((weight, bias, _DenseStruct(weight.data_ptr(), bias.data_ptr(), channels, inputs)))
    position = _check(ends.position, "position", (side * side, width))
    sizes_in_patches = (side, ends.patch, ends.in_channels, ends.out_channels, ends.negated)
    struct = _EndsStruct(*(each for _, _, each in dense), position.data_ptr(), *sizes_in_patches, 1e-6)
    struct.tensors = dense, position
    pixels = (side * ends.patch,) * 2
    struct.shapes = (ends.in_channels, *pixels), (length, width), (ends.out_channels, *pixels)
    _NATIVE_ENDS[ends] = struct
    return struct


def _prologue_struct(prologue: Prologue, rows: int, width: int) -> _PrologueStruct:
    """Shifts and scales may be rows of a wider table; the struct keeps them alive."""
    if isinstance(prologue, Modulation):
        images = prologue.shift.shape[0]
        if images == 0 or rows % images:
            raise ValueError(f"{rows} rows do not divide among {images} images")
        shift = _check(prologue.shift, "shift", (images, width), apart=True)
        scale = _check(prologue.scale, "scale", (images, width), apart=True)
        struct = _PrologueStruct(_MODULATE, max(rows // images, 1), shift.data_ptr(), scale.data_ptr())
        struct.shift_stride, struct.scale_stride, struct.eps = shift.stride(0), scale.stride(0), prologue.eps
        struct.tensors = shift, scale
        return struct
    if prologue not in _NO_MODULATION:
        raise ValueError(f"prologue must be a Modulation, 'gelu', 'silu' or None, not {prologue!r}")
    return _NO_MODULATION[prologue]


class CpuBackend:
    """See :class:`robuq_core.kernels.ops.Backend`.

    An object owns a thread pool, whose threads start with the first op and end with the object. Several Python threads
    may call one object, in turns; the ops of two objects run at the same time. A forked child may go on using both.

    Args:
        threads: the most that work on one op, the calling one among them; ``None`` takes torch's number.
        isa: the path to take; ``None`` leaves the choice to :func:`choose_isa`.

    Raises:
        NativeUnavailableError: the library is not built, or the processor lacks ``isa``.
        ValueError: ``threads`` below 1, or an unknown ``isa``.
    """

    device = torch.device("cpu")
    rows_at_once = 512  # of DiT-XL/2, the widest activation of 512 rows takes 9 MiB

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

    def _call(self, op: str, *arguments: object) -> None:
        """``robuq_OP`` on this backend."""
        if getattr(self._library, f"robuq_{op}")(self._handle, *arguments):
            raise MemoryError(f"{op}: no memory for its working buffers")

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        native, rows = _native_layer(layer), x.shape[0]
        x = _check(x, "x", (rows, native.inputs))
        codes = torch.empty(rows, native.inputs, dtype=torch.int8)
        scales, lowrank = torch.empty(rows), torch.empty(rows, native.rank)
        before = _prologue_struct(prologue, rows, native.inputs)
        out = codes.data_ptr(), scales.data_ptr(), lowrank.data_ptr()
        self._call("rotate_quantize", native.address, x.data_ptr(), rows, ctypes.addressof(before), *out)
        return Quantized(codes, scales, lowrank)

    def ternary_linear(self, x: Quantized, layer: TernaryLayer) -> Tensor:
        native, rows = _native_layer(layer), x.codes.shape[0]
        codes = _check(x.codes, "codes", (rows, native.inputs), torch.int8)
        scales = _check(x.scales, "scales", (rows,))
        lowrank = _check(x.lowrank, "lowrank", (rows, native.rank))
        y = torch.empty(rows, native.outputs)
        quantized = codes.data_ptr(), scales.data_ptr(), lowrank.data_ptr()
        self._call("ternary_linear", native.address, *quantized, rows, y.data_ptr())
        return y

    def ternary(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Tensor:
        """``ternary_linear(rotate_quantize(x))`` in one call, the same bits: ``x [M, K]`` -> ``[M, N]``."""
        native, rows = _native_layer(layer), x.shape[0]
        x, y = _check(x, "x", (rows, native.inputs)), torch.empty(rows, native.outputs)
        before = _prologue_struct(prologue, rows, native.inputs)
        without_gate = None, 0, 1
        self._call(
            *("ternary", native.address, x.data_ptr(), rows, ctypes.addressof(before)), *without_gate, y.data_ptr()
        )
        return y

    def add_ternary(
        self, residual: Tensor, gate: Tensor, x: Tensor, layer: TernaryLayer, prologue: Prologue = None
    ) -> None:
        """``residual [M, N] += gate * ternary(x)`` in place; ``gate [B, N]`` for B images, M / B rows each."""
        native, rows, images = _native_layer(layer), x.shape[0], gate.shape[0]
        x = _check(x, "x", (rows, native.inputs))
        gate = _check(gate, "gate", (images, native.outputs), apart=True)
        if _check(residual, "residual", (rows, native.outputs)) is not residual:
            raise ValueError("residual must be contiguous: it is changed in place")
        if images == 0 or rows % images:
            raise ValueError(f"{rows} rows do not divide among {images} images")
        before = _prologue_struct(prologue, rows, native.inputs)
        gated = gate.data_ptr(), gate.stride(0), max(rows // images, 1), residual.data_ptr()
        self._call("ternary", native.address, x.data_ptr(), rows, ctypes.addressof(before), *gated)

    def add_block(self, x: Tensor, modulation: Tensor, block: Block) -> None:
        struct = _native_block(block)
        images, length, width = x.shape
        if _check(x, "x", (images, length, struct.layers[0].inputs)) is not x:
            raise ValueError("x must be contiguous: it is changed in place")
        modulation = _check(modulation, "modulation", (6, images, width), apart=True)
        entries = modulation.data_ptr(), modulation.stride(0), modulation.stride(1)
        self._call("block", ctypes.addressof(struct), x.data_ptr(), images, length, *entries)

    def embed(self, images: Tensor, ends: Ends) -> Tensor:
        struct = _native_ends(ends)
        pixels, tokens, _ = struct.shapes
        count = len(images)
        x, images = torch.empty(count, *tokens), _check(images, "images", (count, *pixels))
        self._call("embed", ctypes.addressof(struct), images.data_ptr(), count, x.data_ptr())
        return x

    def output(self, x: Tensor, modulation: Tensor, ends: Ends) -> Tensor:
        struct = _native_ends(ends)
        _, tokens, pixels = struct.shapes
        count = len(x)
        x, images = _check(x, "x", (count, *tokens)), torch.empty(count, *pixels)
        modulation = _check(modulation, "modulation", (2, count, tokens[1]), apart=True)
        entries = modulation.data_ptr(), modulation.stride(0), modulation.stride(1)
        self._call("output", ctypes.addressof(struct), x.data_ptr(), count, *entries, images.data_ptr())
        return images

    def modulate(self, c: Tensor, layers: Sequence[TernaryLayer], ends: Ends, table: Tensor, slots: Tensor) -> None:
        struct, native = _native_ends(ends), [_native_layer(layer) for layer in layers]
        rows, width, height = len(c), struct.shapes[1][1], 6 * len(layers) + 2
        if any((each.inputs, each.outputs) != (width, 6 * width) for each in native):
            raise ValueError(f"a modulation's layer must have {width} inputs and {6 * width} outputs")
        if _check(table, "table", (height, table.shape[1], width)) is not table:
            raise ValueError("table must be contiguous: it is changed in place")
        c, slots = _check(c, "c", (rows, width)), _check(slots, "slots", (rows,), torch.int64)
        if rows and not 0 <= int(slots.min()) <= int(slots.max()) < table.shape[1]:
            raise ValueError(f"slots must be from 0 to {table.shape[1] - 1}")
        addresses = (_POINTER * len(native))(*(each.address for each in native))
        entries = slots.data_ptr(), table.data_ptr(), table.stride(0)
        linears = ctypes.addressof(struct), ctypes.addressof(addresses), len(native)
        self._call("modulate", *linears, c.data_ptr(), rows, *entries)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        images, length, triple = qkv.shape
        width = triple // 3
        if num_heads < 1 or triple != 3 * width or width % num_heads:
            raise ValueError(f"qkv of width {triple} does not split into q, k, v of {num_heads} heads")
        qkv, out = _check(qkv, "qkv", (images, length, triple)), torch.empty(images, length, width)
        self._call("attention", qkv.data_ptr(), images, length, width, num_heads, quantized, out.data_ptr())
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, width, outputs = x.shape[0], weight.shape[1], weight.shape[0]
        x, y = _check(x, "x", (rows, width)), torch.empty(rows, outputs)
        weight, bias = _check(weight, "weight", (outputs, width)), _check(bias, "bias", (outputs,))
        self._call(*("linear", x.data_ptr(), weight.data_ptr(), bias.data_ptr(), rows, width, outputs), y.data_ptr())
        return y

    def update(
        self, x: Tensor, previous_x0: Tensor, output: Tensor, steps: Sequence[RowStep], clip: bool, guided_channels: int
    ) -> tuple[Tensor, Tensor]:
        """See :class:`robuq_core.diffusion.update.Update`; one thread, as it takes less time than to wake others."""
        rows, shape = len(steps), x.shape[1:]
        of_guided = rows + sum([step.scale is not None for step in steps])
        channels, values = output.shape[1], shape.numel()
        if channels < shape[0]:
            raise ValueError(f"output must have at least the {shape[0]} channels of x, not {channels}")
        output = _check(output, "output", (of_guided, channels, *shape[1:]))
        x, previous_x0 = _check(x, "x", (rows, *shape)), _check(previous_x0, "previous_x0", (rows, *shape))
        noises = [None if step.noise is None else _check(step.noise, "noise", shape) for step in steps]
        packed = [
            _ROW_STEP.pack(noise.data_ptr() if noise is not None else 0, *step.coefficients, step.scale or 0.0,
                           step.scale is not None, step.multistep)
            for step, noise in zip(steps, noises, strict=True)
        ]  # fmt: skip
        following, x0 = torch.empty_like(x), torch.empty_like(x)
        self._library.robuq_update(
            *(x.data_ptr(), previous_x0.data_ptr(), output.data_ptr(), b"".join(packed), rows, values),
            *(channels * values // shape[0], guided_channels * values // shape[0], clip),
            *(following.data_ptr(), x0.data_ptr()),
        )
        return following, x0
