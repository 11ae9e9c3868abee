"""Results of the ops: against the reference or float64, and of a row alone and among others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpu_checks.check import BFLOAT16, Check
from robuq_core.bench.timing import relative_error
from robuq_core.kernels.ops import Modulation, NarrowBackend, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.quant.packing import unpack_planar

CODES_THAT_MAY_DIFFER = 1e-3
# Half a unit in the last of bfloat16's 8 bits.
ROUNDED = 2**-8


def rotate_quantize(check: Check) -> dict[str, Any]:
    """Codes may differ where a value lies on the edge of its cell; scales and low rank by rounding."""
    worst, rows = {"codes": 0.0, "scales": 0.0, "lowrank": 0.0}, check.sizes.rows[-1]
    for width, bits, grid, kind, dtype in _rotations(check.sizes.widths):
        layer = check.layer(width, 8, bits=bits, rank=3, grid=grid)
        x = check.normal(rows, width) * (1 + 9 * (torch.arange(width, device=check.device) == width // 2))
        x = x.to(dtype)
        prologue = _prologues(check, rows, width)[kind]
        ours, law = (ops.rotate_quantize(x, layer, prologue) for ops in (check.narrow, check.narrow_law))
        found = {
            "codes": float((ours.codes != law.codes).float().mean()),
            "scales": relative_error(ours.scales, law.scales),
            "lowrank": relative_error(ours.lowrank, law.lowrank),
        }
        worst = {name: max(worst[name], found[name]) for name in worst}
    assert worst["codes"] <= CODES_THAT_MAY_DIFFER, worst
    assert max(worst["scales"], worst["lowrank"]) <= 1e-4, worst
    return {"worst": worst}


def _rotations(widths: tuple[int, ...]) -> list[tuple[int, int, str, int, torch.dtype]]:
    """(width, bits, grid, prologue, dtype of the input): all bits and grids at one width, all prologues at each, and
    those in front of proj and fc2 in bfloat16. Each is a kernel to compile: all of the product would take longer than
    a short loan of a GPU."""
    kinds = [(bits, grid) for bits in range(1, 9) for grid in ("midrise", "midtread")]
    first = [(widths[0], *kind, i % 4, torch.float32) for i, kind in enumerate(kinds)]
    inputs = [(k, torch.float32) for k in range(4)] + [(k, BFLOAT16) for k in range(2)]
    return first + [
        (width, *kinds[(5 * i + k) % 16], k, dtype) for i, width in enumerate(widths) for k, dtype in inputs
    ]


def _prologues(check: Check, rows: int, width: int) -> list[Prologue]:
    images = next(n for n in (4, 3, 2, 1) if rows % n == 0)
    return [None, "gelu", "silu", Modulation(check.normal(images, width), check.normal(images, width), 1e-6)]


def ternary_linear(check: Check) -> dict[str, Any]:
    """Bare integer products to the bit; whole outputs against float64, in float32 and in bfloat16."""
    worst, kinds = [0.0, 0.0], ((1, 33, 0), (2, 1024, 16), (5, 131, 1), (7, 64, 32), (8, 200, 5))
    for i, width in enumerate(check.sizes.widths):
        for j, rows in enumerate(check.sizes.rows):
            for bits, outputs, rank in kinds if i == 0 else [kinds[(i + j) % len(kinds)]]:
                errors = _product_errors(check, rows, check.layer(width, outputs, bits=bits, rank=rank))
                worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    assert worst[0] <= 1e-6, worst
    assert worst[1] <= ROUNDED, worst
    return {"worst_relative_error": worst[0], "worst_in_bfloat16": worst[1]}


def _product_errors(check: Check, rows: int, layer: TernaryLayer) -> list[float]:
    """Of the result in float32 and in bfloat16."""
    width, rank, top = layer.in_features, layer.rank, 127 if layer.bits == 8 else 2**layer.bits - 1
    codes = torch.randint(-top, top + 1, (rows, width), generator=check.generator).to(torch.int8)
    codes[0] = top
    x = Quantized(codes.to(check.device), check.normal(rows).abs(), check.normal(rows, rank))
    product = x.codes.double() @ unpack_planar(layer.planar, width).double().T
    ones, zeros = torch.ones_like(layer.alpha), torch.zeros_like(layer.bias)
    none, no_rank = layer.lowrank_a.new_empty(len(ones), 0), layer.lowrank_b.new_empty(0, width)
    bare = TernaryLayer(layer.planar, ones, zeros, layer.signs, none, no_rank, layer.bits, layer.grid)
    y = check.ours.ternary_linear(Quantized(x.codes, torch.ones_like(x.scales), x.lowrank.new_empty(rows, 0)), bare)
    assert torch.equal(y.double(), product), f"product {rows}x{width}x{layer.out_features}, {layer.bits} bits"
    exact = product * (x.scales[:, None].double() * layer.alpha.double())
    exact += x.lowrank.double() @ layer.lowrank_a.double().T + layer.bias.double()
    results = check.ours.ternary_linear(x, layer), check.narrow.ternary_linear(x, layer, BFLOAT16)
    return [relative_error(y, exact) for y in results]


def attention(check: Check) -> dict[str, Any]:
    """The law on the CPU, in float64 and of bfloat16. A probability on an edge between codes may fall either way."""
    errors = {}
    for images, length, heads, head_dim in check.sizes.heads:
        qkv = check.normal(images, length, 3 * heads * head_dim)
        for quantized in (True, False):
            name = f"{images}x{length}, {heads} heads of {head_dim}, {'8-bit' if quantized else 'float'}"
            exact = ReferenceBackend().attention(qkv.cpu().double(), heads, quantized)
            errors[name] = relative_error(check.ours.attention(qkv, heads, quantized), exact)
            # So few bits lie on edges often: float64, which divides more finely, would tell them otherwise.
            law = NarrowReferenceBackend().attention(qkv.to(BFLOAT16).cpu(), heads, quantized)
            found = check.narrow.attention(qkv.to(BFLOAT16), heads, quantized)
            errors[f"{name}, bf16"] = relative_error(found, law)
    assert max(errors.values()) <= 1e-3, errors
    return {"relative_error": errors}


def dense_linear(check: Check) -> dict[str, Any]:
    worst = 0.0
    for rows in check.sizes.rows:
        for width, outputs in ((16, 1152), (1152, 32), (13, 7), (256, 65)):
            x, weight, bias = check.normal(rows, width), check.normal(outputs, width), check.normal(outputs)
            exact = F.linear(x.double(), weight.double(), bias.double())
            worst = max(worst, relative_error(check.ours.linear(x, weight, bias), exact))
    assert worst <= 1e-6, worst
    return {"worst_relative_error": worst}


def rows_are_their_own(check: Check) -> dict[str, Any]:
    """Bytes of a row alone and among others. Numpy, behind the interpreter, does not keep that promise."""
    broken = []
    for ops in (check.ours, check.narrow):
        for width in check.sizes.widths:
            broken += _broken_rows(check, ops, width)
        for images, length, heads, head_dim in check.sizes.heads:
            qkv = check.normal(images, length, 3 * heads * head_dim).to(ops.activations)
            for quantized in (True, False):
                alone, whole = (ops.attention(pictures, heads, quantized) for pictures in (qkv[-1:], qkv))
                if not torch.equal(alone, whole[-1:]):
                    broken.append(f"attention {length}x{head_dim}, quantized={quantized}, {ops.activations}")
    assert not broken or not check.on_gpu, broken
    return {"broken": broken}


def _broken_rows(check: Check, ops: NarrowBackend, width: int) -> list[str]:
    layer, rows = check.layer(width, 3 * width), check.sizes.rows[-1]
    x, weight, bias = check.normal(rows, width), check.normal(40, width), check.normal(40)
    tokens, broken = x.to(ops.activations), []
    whole, dense = ops.rotate_quantize(tokens, layer), ops.linear(x, weight, bias)
    y = ops.ternary_linear(whole, layer, ops.activations)
    for count in check.sizes.rows:
        first = min(5, rows - count)
        part = slice(first, first + count)
        again = ops.rotate_quantize(tokens[part], layer)
        same = {
            "codes": torch.equal(again.codes, whole.codes[part]),
            "scales": torch.equal(again.scales, whole.scales[part]),
            "lowrank": torch.equal(again.lowrank, whole.lowrank[part]),
            "product": torch.equal(ops.ternary_linear(again, layer, ops.activations), y[part]),
            "linear": torch.equal(ops.linear(x[part], weight, bias), dense[part]),
        }
        where = f"width {width}, {count} of {rows} rows, {ops.activations}"
        broken += [f"{name}, {where}" for name, kept in same.items() if not kept]
    return broken
