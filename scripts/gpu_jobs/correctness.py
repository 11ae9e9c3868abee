"""Are the kernels right, are rows their own, and does the same input give the same bytes?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_jobs.context import BFLOAT16, Context
from robuq_core.bench.timing import relative_error
from robuq_core.kernels.ops import Backend, FusedBackend, Modulation, NarrowBackend, Quantized, TernaryLayer
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.quant.packing import unpack_planar

# A value on the edge between two cells may fall either way.
CODES_THAT_MAY_DIFFER = 1e-3
# Of an output's norm. Tensor cores that cut sums off err by 5e-7; the mean error tells them from a wrong kernel.
FLOAT_TOLERANCE, BF16_TOLERANCE, ATTENTION_TOLERANCE = 3e-6, 2**-8, 1e-3


def quantized_errors(found: Quantized, expected: Quantized) -> dict[str, float]:
    errors = {
        "codes": float((found.codes != expected.codes).float().mean()),
        "scales": relative_error(found.scales, expected.scales),
    }
    if expected.lowrank.numel():
        errors["lowrank"] = relative_error(found.lowrank, expected.lowrank)
    return errors


def mean_error(found: Tensor, expected: Tensor) -> float:
    """Signed, by the size of the expected values: sums that are cut off err towards zero."""
    difference = (found.double() - expected.double()) * expected.double().sign()
    return float(difference.mean() / expected.double().abs().mean())


def exact_product(x: Quantized, layer: TernaryLayer) -> Tensor:
    """Equation (5) in float64."""
    product = x.codes.double() @ unpack_planar(layer.planar, layer.in_features).double().T
    scaled = product * (x.scales[:, None].double() * layer.alpha.double())
    return scaled + x.lowrank.double() @ layer.lowrank_a.double().T + layer.bias.double()


def exact_attention(qkv: Tensor, heads: int, quantized: bool) -> Tensor:
    """On the CPU: in float64 for float32; bfloat16 values lie on edges so often that only float32's way to divide tells
    on which side."""
    if qkv.dtype is BFLOAT16:
        return NarrowReferenceBackend().attention(qkv.cpu(), heads, quantized)
    return ReferenceBackend().attention(qkv.cpu().double(), heads, quantized)


def worst(errors: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(each.get(name, 0.0) for each in errors) for name in sorted({n for each in errors for n in each})}


def smoke(context: Context) -> None:
    """Every op once, in the shapes of the network."""
    rows = context.sizes.timed_rows[0]
    for name, (width, outputs) in context.sizes.shapes.items():
        layer, x = context.layer(width, outputs), context.tokens(rows, width)
        for prologue in ("gelu",) if name == "fc2" else (None, context.modulation(1, width)):
            found = context.ours.rotate_quantize(x, layer, prologue)
            errors = quantized_errors(found, context.reference.rotate_quantize(x, layer, prologue))
            errors["output"] = relative_error(context.ours.ternary_linear(found, layer), exact_product(found, layer))
            holds = errors.pop("codes") <= CODES_THAT_MAY_DIFFER and max(errors.values()) <= 1e-4
            context.check(holds, layer=name, prologue=str(type(prologue).__name__), errors=errors)
    images, length, heads, head_dim = context.sizes.heads[0]
    qkv = context.normal(images, length, 3 * heads * head_dim)
    error = relative_error(context.ours.attention(qkv, heads, True), exact_attention(qkv, heads, True))
    context.check(error <= ATTENTION_TOLERANCE, layer="attention", error=error)


def rotation(context: Context) -> None:
    """Codes, scales and low rank: every bit width and grid at one width, every prologue and dtype at each."""
    kinds: list[tuple[int, Any]] = [(bits, grid) for bits in range(1, 9) for grid in ("midrise", "midtread")]
    cases = [(context.sizes.widths[0], *kind, i % 4, torch.float32) for i, kind in enumerate(kinds)]
    for i, width in enumerate(context.sizes.widths):
        for kind in range(4):  # each is a kernel to compile
            dtype = BFLOAT16 if (i + kind) % 2 else torch.float32
            cases.append((width, *kinds[(5 * i + kind) % 16], kind, dtype))
    cases = cases[context.part :: context.parts]
    rows, found = context.sizes.rows[-1], []
    for width, bits, grid, kind, dtype in cases:
        layer = context.layer(width, 8, bits=bits, rank=3, grid=grid)
        x, prologue = context.tokens(rows, width).to(dtype), context.prologues(rows, width)[kind]
        sides = (context.narrow, context.narrow_reference)
        found.append(quantized_errors(*(ops.rotate_quantize(x, layer, prologue) for ops in sides)))
    errors = worst(found)
    holds = errors["codes"] <= CODES_THAT_MAY_DIFFER and max(errors["scales"], errors["lowrank"]) <= 1e-4
    context.check(holds, cases=len(cases), worst=errors)


def product(context: Context) -> None:
    """Bare integer products to the bit; whole outputs against float64."""
    shapes = ((1, 33, 0), (2, 1024, 16), (5, 131, 1), (7, 64, 32), (8, 200, 5))
    cases = [
        (width, rows, *shape)
        for i, width in enumerate(context.sizes.widths)
        for j, rows in enumerate(context.sizes.rows)
        for shape in (shapes if i == 0 else [shapes[(i + j) % len(shapes)]])
    ]
    found, means = [], []
    for width, rows, bits, outputs, rank in cases[context.part :: context.parts]:
        layer = context.layer(width, outputs, bits=bits, rank=rank)
        top = 127 if bits == 8 else 2**bits - 1
        codes = torch.randint(-top, top + 1, (rows, width), generator=context.generator).to(torch.int8)
        x = Quantized(codes.to(context.device), context.normal(rows).abs(), context.normal(rows, rank))
        context.check(_is_exact(context, x, layer), rows=rows, width=width, outputs=outputs, bits=bits)
        exact = exact_product(x, layer)
        y = context.ours.ternary_linear(x, layer)
        means.append(mean_error(y, exact))
        narrow = context.narrow.ternary_linear(x, layer, BFLOAT16)
        found.append({"float32": relative_error(y, exact), "bfloat16": relative_error(narrow, exact)})
    errors = worst(found)
    holds = errors["float32"] <= FLOAT_TOLERANCE and errors["bfloat16"] <= BF16_TOLERANCE
    context.check(holds, cases=len(found), worst=errors, mean_error=sum(means) / len(means))


def _is_exact(context: Context, x: Quantized, layer: TernaryLayer) -> bool:
    """Unit scales and nothing added leave the integer product."""
    rows, width = x.codes.shape
    none = layer.lowrank_a.new_empty(layer.out_features, 0), layer.lowrank_b.new_empty(0, width)
    ones, zeros = torch.ones_like(layer.alpha), torch.zeros_like(layer.bias)
    bare = TernaryLayer(layer.planar, ones, zeros, layer.signs, *none, layer.bits, layer.grid)
    y = context.ours.ternary_linear(Quantized(x.codes, torch.ones_like(x.scales), x.lowrank.new_empty(rows, 0)), bare)
    return torch.equal(y.double(), x.codes.double() @ unpack_planar(layer.planar, width).double().T)


def attention(context: Context) -> None:
    found = {}
    for images, length, heads, head_dim in context.sizes.heads[context.part :: context.parts]:
        for dtype in (torch.float32, BFLOAT16):
            for quantized in (True, False):
                qkv = context.normal(images, length, 3 * heads * head_dim).to(dtype)
                ops = context.ours if dtype is torch.float32 else context.narrow
                name = f"{images}x{length}, {heads} heads of {head_dim}, {dtype}, {'8-bit' if quantized else 'float'}"
                expected = exact_attention(qkv, heads, quantized)
                found[name] = relative_error(ops.attention(qkv, heads, quantized), expected)
    context.check(max(found.values(), default=0.0) <= ATTENTION_TOLERANCE, errors=found)


def rows(context: Context) -> None:
    """The bytes of rows alone and among others, in every op; the dense linear against float64."""
    broken = []
    for ops in (context.ours, context.narrow):
        for width in context.sizes.widths[context.part :: context.parts]:
            layer, total = context.layer(width, 3 * width), context.sizes.rows[-1]
            inputs = context.tokens(total, width)
            whole = list(_row_results(context, ops, inputs, layer, slice(0, total)))
            for count in context.sizes.rows:
                first = min(5, total - count)
                part = slice(first, first + count)
                for (name, found), (_, expected) in zip(_row_results(context, ops, inputs, layer, part), whole,
                                                        strict=True):  # fmt: skip
                    if not torch.equal(found, expected[part]):
                        broken.append(f"{name}, width {width}, {count} of {total} rows, {ops.activations}")
        for images, length, heads, head_dim in context.sizes.heads[context.part :: context.parts]:
            qkv = context.normal(images, length, 3 * heads * head_dim).to(ops.activations)
            for quantized in (True, False):
                alone, together = (ops.attention(each, heads, quantized) for each in (qkv[-1:], qkv))
                if not torch.equal(alone, together[-1:]):
                    broken.append(f"attention {length} x {head_dim}, quantized={quantized}, {ops.activations}")
    x, weight, bias = context.normal(130, 1152), context.normal(32, 1152), context.normal(32)
    error = relative_error(context.ours.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    context.check(not broken and error <= FLOAT_TOLERANCE, broken=broken, dense_linear=error)


def _row_results(context: Context, ops: NarrowBackend, x: Tensor, layer: TernaryLayer,
                 part: slice) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    quantized = ops.rotate_quantize(x[part].to(ops.activations), layer)
    yield from (("codes", quantized.codes), ("scales", quantized.scales), ("low rank", quantized.lowrank))
    yield "product", ops.ternary_linear(quantized, layer, ops.activations)
    if isinstance(ops, FusedBackend):
        residual = torch.ones(len(x[part]), layer.out_features, device=x.device)
        gate = torch.full((1, layer.out_features), 0.5, device=x.device)
        ops.add_ternary(residual, gate, x[part].to(ops.activations), layer)
        yield "add_ternary", residual
    yield "linear", ops.linear(x[part], layer.lowrank_b, layer.lowrank_b[:, 0].contiguous())


def op_calls(context: Context, ops: NarrowBackend, rows: int) -> dict[str, Callable[[], Any]]:
    """Every op of the network once, on fixed inputs."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, (width, outputs) in context.sizes.shapes.items():
        layer, x = context.layer(width, outputs), context.tokens(rows, width).to(ops.activations)
        prologue: Any = context.modulation(1, width) if name in ("qkv", "fc1") else "gelu" if name == "fc2" else None
        if isinstance(prologue, Modulation):
            x = x.float()
        quantized = ops.rotate_quantize(x, layer, prologue)
        calls[f"rotate_quantize {name}"] = lambda x=x, layer=layer, p=prologue: ops.rotate_quantize(x, layer, p)
        calls[f"ternary_linear {name}"] = lambda q=quantized, layer=layer: ops.ternary_linear(q, layer)
    images, length, heads, head_dim = context.sizes.heads[0]
    qkv = context.normal(images, length, 3 * heads * head_dim).to(ops.activations)
    calls["attention"] = lambda: ops.attention(qkv, heads, True)
    return calls


def repeats(context: Context) -> None:
    """The same bytes every time; a race would show here sooner or later."""
    differ = {}
    for name, call in op_calls(context, context.ours, context.sizes.timed_rows[0]).items():
        expected = [each.clone() for each in _tensors(call())]
        count = 0
        for _ in range(context.sizes.repeats):
            count += not all(map(torch.equal, _tensors(call()), expected))
        differ[name] = count
    context.check(not any(differ.values()), repeats=context.sizes.repeats, differ=differ)


def _tensors(result: Any) -> list[Tensor]:
    return [result.codes, result.scales, result.lowrank] if isinstance(result, Quantized) else [result]


def launches(context: Context) -> None:
    """Each op once: what the profiler and the sanitizer watch."""
    for call in op_calls(context, context.narrow, 256 if context.part == 0 and not context.rehearse else 9).values():
        call()
    context.wait()


def sanitizer(context: Context) -> None:
    """Races and stray accesses, by the toolkit's own checker, on a few rows."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        context.record(absent="compute-sanitizer")
        return
    for kind in ("racecheck", "memcheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "3", sys.executable, sys.argv[0], "job", "launches",
                   "--share", "1/2", "--out", str(context.out)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        context.check(done.returncode == 0, tool=kind, output=done.stdout[-1500:])


def graphs(context: Context) -> None:
    """Recorded forwards equal eager ones to the bit, and a replay computes: it follows its input."""
    from gpu_jobs.speed import network, rows_of

    for name, backend in context.network_backends.items():
        packed = network(context, backend, depth=min(2, context.sizes.model.depth))
        for count in (1, 3):
            first, second = rows_of(context, count), rows_of(context, count)
            found = packed.forward(*first).clone()
            other = packed.forward(*second).clone()
            x, timesteps, classes = first
            places = packed.conditioning.slots(timesteps.tolist(), classes.tolist())
            eager = packed.denoise(x, places, packed.conditioning.table)
            holds = torch.equal(packed.forward(*first), found) and torch.equal(found, eager)
            context.check(holds and not torch.equal(found, other), activations=name, rows=count)
        against = _reference(context, backend, packed, first)
        context.check(against <= 0.05, activations=name, relative_error=against)


def _reference(context: Context, backend: Backend, packed: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    narrow = getattr(backend, "activations", torch.float32) is BFLOAT16
    law = packed.replica(context.narrow_reference if narrow else context.reference)
    return relative_error(packed.forward(*inputs), law.forward(*inputs))


JOBS = (smoke, rotation, product, attention, rows, repeats, launches, sanitizer, graphs)
