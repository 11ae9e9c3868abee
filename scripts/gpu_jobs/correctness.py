"""Are the kernels right, are rows their own, and does the same input give the same bytes?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product as every
from typing import Any

import torch
from torch import Tensor

from gpu_jobs.context import BFLOAT16, Context
from robuq_core.bench.timing import relative_error
from robuq_core.kernels.ops import Quantized
from robuq_core.kernels.reference import NarrowReferenceBackend, ReferenceBackend
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.quant.packing import unpack_planar

Calls = dict[str, list[Callable[[], Any]]]
# A value on the edge between two cells may get either code. Tensor cores that cut sums off err by 5e-7.
TOLERANCES = {"codes": 1e-3, "scales": 1e-4, "lowrank": 1e-4, "float32": 3e-6, "bfloat16": 2**-8, "attention": 1e-3}
QUANTISERS = list(every(range(1, 9), ("midrise", "midtread")))


def check_layer(context: Context, rows: int, width: int, outputs: int, kind: int, bits: int = 3, grid: str = "midrise",
                rank: int = 16, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Codes, scales and low rank against the reference; their product, eq. (5), against float64."""
    layer, x = context.layer(width, outputs, bits=bits, rank=rank, grid=grid), context.tokens(rows, width).to(dtype)
    images = next(n for n in (4, 3, 2, 1) if rows % n == 0)
    prologue = (None, "gelu", "silu", context.modulation(images, width))[kind]
    found, expected = (ops.rotate_quantize(x, layer, prologue) for ops in (context.narrow, context.narrow_reference))
    integers = found.codes.double() @ unpack_planar(layer.planar, width).double().T
    exact = integers * (found.scales[:, None].double() * layer.alpha.double()) + layer.bias.double()
    exact += found.lowrank.double() @ layer.lowrank_a.double().T
    errors = {
        "codes": float((found.codes != expected.codes).float().mean()),
        "scales": relative_error(found.scales, expected.scales),
        "lowrank": relative_error(found.lowrank, expected.lowrank) if rank else 0.0,
        "float32": relative_error(context.wide.ternary_linear(found, layer), exact),
        "bfloat16": relative_error(context.narrow.ternary_linear(found, layer, BFLOAT16), exact),
    }
    holds = all(error <= TOLERANCES[name] for name, error in errors.items())
    context.check(holds, case=(rows, width, outputs, kind, bits, grid, rank, dtype), errors=errors)


def check_attention(context: Context, heads: tuple[int, int, int, int], dtype: torch.dtype, quantized: bool) -> None:
    """On the CPU: in float64 for float32; bfloat16 values lie on edges so often that only float32's way to divide tells
    on which side."""
    images, length, count, head_dim = heads
    qkv = context.normal(images, length, 3 * count * head_dim).to(dtype)
    exact, read = (NarrowReferenceBackend(), qkv) if dtype is BFLOAT16 else (ReferenceBackend(), qkv.double())
    expected = exact.attention(read.cpu(), count, quantized)
    error = relative_error(context.narrow.attention(qkv, count, quantized), expected)
    context.check(error <= TOLERANCES["attention"], heads=heads, dtype=dtype, quantized=quantized, error=error)


def smoke(context: Context) -> None:
    """Every op once, in the shapes of the network."""
    for name, width, outputs in context.sizes.shapes:
        for kind in (1,) if name == "fc2" else (0, 3):
            check_layer(context, context.sizes.timed_rows[0], width, outputs, kind)
    check_attention(context, context.sizes.heads[0], torch.float32, True)


def layers(context: Context) -> None:
    """Every bit width and grid at one width; every prologue, number of rows and dtype at each."""
    shapes = ((33, 0), (1024, 16), (131, 1), (64, 32), (200, 5))  # outputs, rank
    most, first = context.sizes.rows[-1], context.sizes.widths[0]
    cases = [(most, first, 33, i % 4, *quantiser, i % 5) for i, quantiser in enumerate(QUANTISERS)]
    for i, (width, rows) in enumerate(every(context.sizes.widths, context.sizes.rows)):
        outputs, rank = shapes[i % 5]
        dtype = BFLOAT16 if i // 4 % 2 else torch.float32
        cases.append((rows, width, outputs, i % 4, *QUANTISERS[5 * i % 16], rank, dtype))
    for case in context.share(cases):
        check_layer(context, *case)


def attention(context: Context) -> None:
    for case in context.share(list(every(context.sizes.heads, (torch.float32, BFLOAT16), (True, False)))):
        check_attention(context, *case)


def op_calls(context: Context, ops: TritonBackend, rows: int, rank: int = 16, copies: bool = False,
             part: slice = slice(None)) -> Calls:  # fmt: skip
    """Every op of the network on the same random inputs, or ``part`` of their rows; with ``copies``, once for each."""
    context.generator.manual_seed(0)
    calls: Calls = {}
    several = context.copies if copies else lambda tensor: [tensor]
    for name, width, outputs in context.sizes.shapes:
        layer, modulation = context.layer(width, outputs, rank=rank), context.modulation(1, width)
        first = name in ("qkv", "fc1")
        prologue, dtype = (modulation, torch.float32) if first else (None, ops.activations)
        inputs = several(context.tokens(rows, width)[part].to(dtype))
        quantized = [ops.rotate_quantize(x, layer, prologue) for x in inputs]
        calls[f"rotation of {name}"] = [partial(ops.rotate_quantize, x, layer, prologue) for x in inputs]
        written, gelu = ops.activations if first else torch.float32, name == "fc1"
        calls[f"product of {name}"] = [partial(ops.ternary_linear, x, layer, written, gelu) for x in quantized]
        if not first:
            residual, gate = torch.ones(len(inputs[0]), outputs, device=context.device), context.normal(1, outputs)
            calls[f"{name} into the residual"] = [partial(ops.add_ternary, residual, gate, x, layer) for x in inputs]
    x, weight, bias = context.tokens(rows, 1152)[part], context.normal(32, 1152), context.normal(32)
    calls["dense linear"] = [partial(ops.linear, x, weight, bias)]
    _, length, heads, head_dim = context.sizes.heads[0]
    qkv = context.normal(max(1, rows // length), length, 3 * heads * head_dim).to(ops.activations)
    calls["attention"] = [partial(ops.attention, each, heads, True) for each in several(qkv)]
    return calls


def results(calls: Calls) -> dict[str, list[Tensor]]:
    """Of each op on its first input; of one that adds to a residual, nothing."""
    found = {name: each[0]() for name, each in calls.items()}
    return {
        name: [each.codes, each.scales, each.lowrank] if isinstance(each, Quantized) else [each]
        for name, each in found.items()
        if each is not None
    }


def differ(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], part: slice = slice(None)) -> list[str]:
    """Ops whose bytes differ. ``part``: rows of what is expected; attention has images, not rows."""
    return [
        name
        for name, tensors in expected.items()
        for a, b in zip(found[name], tensors, strict=True)
        if not torch.equal(a, b if name == "attention" else b[part])
    ]


def rows(context: Context) -> None:
    """The bytes of rows alone and among others, in every op; images that attend alone and together."""
    total, (images, length, heads, head_dim) = context.sizes.timed_rows[0], context.sizes.heads[0]
    for ops in context.share([context.wide, context.narrow]):
        whole = results(op_calls(context, ops, total))
        for count in context.sizes.rows:
            part = slice(min(5, total - count), min(5, total - count) + count)
            found = differ(results(op_calls(context, ops, total, part=part)), whole, part)
            context.check(not found, rows=count, activations=ops.activations, differ=found)
        qkv = context.normal(images, length, 3 * heads * head_dim).to(ops.activations)
        alone, together = (ops.attention(each, heads, True) for each in (qkv[-1:], qkv))
        context.check(torch.equal(alone, together[-1:]), attention=(length, head_dim), activations=ops.activations)


def repeats(context: Context) -> None:
    """The same bytes every time; a race would show here sooner or later."""
    calls = op_calls(context, context.wide, context.sizes.timed_rows[0])
    expected = results(calls)
    found = [name for _ in range(context.sizes.repeats) for name in differ(results(calls), expected)]
    context.check(not found, repeats=context.sizes.repeats, differ=sorted(set(found)))


def launches(context: Context) -> None:
    """Each op once: what the profiler and the sanitizer watch."""
    few = context.rehearse or context.parts > 1
    results(op_calls(context, context.narrow, 9 if few else 256))
    context.wait()


def watched(context: Context, tool: str, *options: str) -> subprocess.CompletedProcess[str] | None:
    """The launches under a tool of NVIDIA's, on few rows for the slow one; None where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        context.record(absent=tool)
        return None
    share = "0/2" if tool == "compute-sanitizer" else "0/1"
    command = [path, *options, sys.executable, sys.argv[0], "job", "launches", "--share", share]
    return subprocess.run([*command, "--out", str(context.out)], capture_output=True, text=True, timeout=50)


def sanitizer(context: Context) -> None:
    """Races and stray accesses, by the toolkit's own checker, on a few rows."""
    for kind in ("racecheck", "memcheck"):
        if done := watched(context, "compute-sanitizer", "--tool", kind, "--error-exitcode", "3"):
            context.check(done.returncode == 0, tool=kind, output=done.stdout[-1500:])


def graphs(context: Context) -> None:
    """Recorded forwards equal eager ones to the bit, and a replay computes: it follows its input."""
    for name, backend in context.network_backends.items():
        packed = context.network(backend, depth=min(2, context.sizes.model.depth))
        for count in (1, 3):
            first, second = context.inputs(count), context.inputs(count)
            found, other = packed.forward(*first).clone(), packed.forward(*second).clone()
            x, timesteps, classes = first
            places = packed.conditioning.slots(timesteps, classes)
            eager = packed.denoise(x, places, packed.conditioning.table)
            holds = torch.equal(packed.forward(*first), found) and torch.equal(found, eager)
            context.check(holds and not torch.equal(found, other), activations=name, rows=count)
        exact = packed.replica(context.narrow_reference if name == "bfloat16" else context.reference)
        error = relative_error(packed.forward(*first), exact.forward(*first))
        context.check(error <= 0.05, activations=name, relative_error=error)


JOBS = (smoke, layers, attention, rows, repeats, launches, sanitizer, graphs)
