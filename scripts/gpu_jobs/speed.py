"""How fast: the device's ceilings, single ops, whole forwards, counters of the profiler, launch shapes."""

from __future__ import annotations

import functools
import itertools
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_jobs.context import BFLOAT16, Context
from gpu_jobs.correctness import op_calls
from robuq_core.bench.source import plain_network, random_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.kernels.ops import Backend, FusedBackend, Modulation, fused_linear
from robuq_core.models.packed_dit import PackedDiT

RowInputs = tuple[Tensor, Tensor, Tensor]


def machine(context: Context) -> None:
    """What it is, and two ceilings: bytes copied a second, bf16 products a second."""
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    context.record(**found)
    if smi := shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=20)
        context.record(nvidia_smi=done.stdout.strip())
    size = 2**28 if not context.rehearse else 2**16
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    n = 8192 if not context.rehearse else 64
    a, b = (torch.randn(n, n, device=context.device).bfloat16() for _ in range(2))
    copy_ms, product_ms = (
        context.milliseconds([call] * 4) for call in (lambda: target.copy_(source), lambda: torch.mm(a, b))
    )
    context.record(copy_gb_per_s=2 * size / copy_ms / 1e6, bf16_tflops=2 * n**3 / product_ms / 1e9)


def compile(context: Context) -> None:
    """Fill Triton's cache with this process's share of what later jobs launch."""
    calls = [
        *(functools.partial(network_call, context, backend, count)
          for backend in context.network_backends.values() for count in context.sizes.batches),
        *(functools.partial(_all_ops, context, ops, rows)
          for ops in (context.ours, context.narrow) for rows in context.sizes.timed_rows),
    ]  # fmt: skip
    for call in calls[context.part :: context.parts]:
        call()
    context.wait()
    context.record(share=f"{context.part}/{context.parts}", calls=len(calls[context.part :: context.parts]))


def network_call(context: Context, backend: Backend, count: int) -> None:
    network(context, backend, depth=1).forward(*rows_of(context, count))


def _all_ops(context: Context, ops: Any, rows: int) -> None:
    for call in op_calls(context, ops, rows).values():
        call()


def ops(context: Context) -> None:
    """Each layer of a block, in the dtypes of both kinds of network, beside cuBLAS in bf16 and int8 and FP32."""
    for rows in context.sizes.timed_rows:
        for name, (width, outputs) in context.sizes.shapes.items():
            found: dict[str, Any] = {}
            for ops in (context.ours, context.narrow):
                kind = "bf16" if ops is context.narrow else "fp32"
                found |= {f"{part}, {kind}": ms for part, ms in _layer_times(context, ops, rows, name).items()}
            found |= _peer_times(context, rows, width, outputs)
            context.record(rows=rows, layer=name, ms=found)
    images, length, heads, head_dim = context.sizes.heads[0]
    for batch in (images, 4 * images):
        for ops in (context.ours, context.narrow):
            qkv = context.normal(batch, length, 3 * heads * head_dim).to(ops.activations)
            runs = [functools.partial(ops.attention, each, heads, True) for each in context.copies(qkv)]
            record = {"ours": context.milliseconds(runs)}
            q, k, v = qkv.reshape(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            record["torch"] = context.milliseconds([functools.partial(F.scaled_dot_product_attention, q, k, v)] * 2)
            context.record(attention=[batch, length, heads, head_dim], dtype=str(ops.activations), ms=record)


def _layer_times(context: Context, ops: Any, rows: int, name: str) -> dict[str, float]:
    """Rotation, product, both, and with the sum into the residual where the backend has that."""
    width, outputs = context.sizes.shapes[name]
    layer, bare = context.layer(width, outputs), context.layer(width, outputs, rank=0)
    x = context.tokens(rows, width)
    prologue: Any = None
    if name in ("qkv", "fc1"):
        prologue = Modulation(context.normal(1, width), context.normal(1, width), 1e-6)
    else:
        x = x.to(ops.activations)
    inputs = context.copies(x)
    quantized = [ops.rotate_quantize(each, layer, prologue) for each in inputs]
    written = ops.activations if name in ("qkv", "fc1") else torch.float32
    run = fused_linear(ops, name in ("qkv", "fc1"))
    calls: dict[str, list[Callable[[], object]]] = {
        "rotate_quantize": [functools.partial(ops.rotate_quantize, each, layer, prologue) for each in inputs],
        "rotate_quantize, rank 0": [functools.partial(ops.rotate_quantize, each, bare, prologue) for each in inputs],
        "ternary_linear": [functools.partial(ops.ternary_linear, each, layer, written) for each in quantized],
        "layer": [functools.partial(run, each, layer, prologue) for each in inputs],
        "layer, rank 0": [functools.partial(run, each, bare, prologue) for each in inputs],
    }
    if isinstance(ops, FusedBackend) and name in ("proj", "fc2"):
        residual, gate = context.normal(rows, outputs), context.normal(1, outputs)
        calls["add_ternary"] = [functools.partial(ops.add_ternary, residual, gate, each, layer) for each in inputs]
    return {part: context.milliseconds(each) for part, each in calls.items()}


def _peer_times(context: Context, rows: int, width: int, outputs: int) -> dict[str, Any]:
    x, weight = context.normal(rows, width), context.normal(outputs, width)
    halves, codes = x.bfloat16(), torch.ones(rows, width, dtype=torch.int8, device=context.device)
    narrow, ternary = weight.bfloat16(), torch.ones(outputs, width, dtype=torch.int8, device=context.device)
    sides: dict[str, list[Callable[[], object]]] = {
        "cuBLAS fp32": [functools.partial(F.linear, each, weight) for each in context.copies(x)],
        "cuBLAS bf16": [functools.partial(F.linear, each, narrow) for each in context.copies(halves)],
        "cuBLAS int8": [functools.partial(torch._int_mm, each, ternary.T) for each in context.copies(codes)],
    }
    found: dict[str, Any] = {}
    for name, calls in sides.items():
        try:
            found[name] = context.milliseconds(calls)
        except Exception as error:  # more than 16 rows, multiples of 8: cuBLAS has terms of its own
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def network(context: Context, backend: Backend, depth: int | None = None) -> PackedDiT:
    config = context.sizes.model.model_copy(update={"depth": depth or context.sizes.model.depth})
    found = random_checkpoint(config, QuantConfig())
    return PackedDiT(config, found.dense, found.layers, backend)


def rows_of(context: Context, count: int) -> RowInputs:
    config = context.sizes.model
    x = context.normal(count, config.in_channels, config.input_size, config.input_size)
    return x, 37 * torch.arange(count) % 1000, torch.arange(count) % config.num_classes


def forwards(context: Context) -> None:
    """Ours, as it serves: recorded graphs. ``new_pairs_ms``: with timesteps and classes that were not met before."""
    packed: PackedDiT | None = None
    for name, backend in context.network_backends.items():
        packed = network(context, backend) if packed is None else packed.replica(backend)
        _reset_peak(context)
        for count in context.sizes.batches:
            inputs = rows_of(context, count)
            packed.forward(*inputs)
            run = functools.partial(packed.forward, *inputs)
            found = {"ms": context.event_milliseconds(run, 11), "wall_ms": _wall_ms(context, run)}
            found["new_pairs_ms"] = _wall_ms(context, functools.partial(_forget_and_run, packed, inputs))
            context.record(side=f"ours, {name} activations", rows=count, peak_bytes=_peak(context),
                           weight_bytes=packed.weight_bytes, **found)  # fmt: skip


def _forget_and_run(packed: PackedDiT, inputs: RowInputs) -> Tensor:
    packed.conditioning.clear()
    return packed.forward(*inputs)


def forwards_again(context: Context) -> None:
    """For the spread."""
    forwards(context)


def forwards_fp32(context: Context) -> None:
    """Eager FP32, without TF32: what the paper compares with."""
    plain = plain_network(context.sizes.model, context.device)
    _time_plain(context, "FP32 eager", plain, torch.float32, graphed=False)


def forwards_bf16(context: Context) -> None:
    """bf16 with each block compiled, the whole forward as one CUDA graph."""
    plain = plain_network(context.sizes.model, context.device, BFLOAT16)
    if context.device.type == "cuda":
        for block in plain.blocks:
            block.compile(dynamic=False)
    _time_plain(context, "bf16 compiled and graphed", plain, BFLOAT16, graphed=True)


def _time_plain(context: Context, side: str, plain: Any, dtype: torch.dtype, graphed: bool) -> None:
    _reset_peak(context)
    for count in context.sizes.batches:
        x, timesteps, classes = rows_of(context, count)
        inputs = x.to(dtype), timesteps.to(context.device), classes.to(context.device)
        run = functools.partial(plain, *inputs)
        run()
        found = {"eager_ms": context.event_milliseconds(run, 5)}
        context.record(side=side, rows=count, peak_bytes=_peak(context), **found)
        if graphed:
            # Embedding the timestep copies from the host, which a graph cannot record; ours looks it up, too.
            embedded, forward = plain.t_embedder(inputs[1]), plain.t_embedder.forward
            plain.t_embedder.forward = lambda _, embedded=embedded: embedded
            context.record(side=side, rows=count, ms=context.milliseconds([run], 11), peak_bytes=_peak(context))
            plain.t_embedder.forward = forward


def _wall_ms(context: Context, run: Callable[[], object]) -> float:
    """As the host sees it."""
    calls = 1 if context.rehearse else 10
    run()
    context.wait()
    began = time.perf_counter()
    for _ in range(calls):
        run()
        context.wait()
    return 1e3 * (time.perf_counter() - began) / calls


def _reset_peak(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(context: Context) -> int | None:
    return torch.cuda.max_memory_allocated() if context.device.type == "cuda" else None


def counters(context: Context) -> None:
    """Nsight Compute on one launch of each kernel, into ``ncu.csv``."""
    tool = shutil.which("ncu")
    if tool is None:
        context.record(absent="ncu")
        return
    sections = (
        "SpeedOfLight",
        "Occupancy",
        "MemoryWorkloadAnalysis_Tables",
        "ComputeWorkloadAnalysis",
        "WarpStateStats",
    )
    target = context.out / "ncu.csv"
    command = [tool, "--clock-control", "none", "--csv", "--page", "details", "--kernel-name", "regex:_kernel$",
               *itertools.chain.from_iterable(("--section", each) for each in sections), "--log-file", str(target),
               sys.executable, sys.argv[0], "job", "launches", "--out", str(context.out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=45)
    lines = target.read_text().count("\n") if target.exists() else 0
    context.record(code=done.returncode, lines=lines, error=done.stderr[-800:])


def tune(context: Context) -> None:
    """Launch shapes of the ternary product: the likely first, kept if their bytes equal the default's.

    The table is saved in ``ROBUQ_CACHE_DIR`` after each shape, so that a run that is cut short has what it measured.
    """
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton import tuning
    from robuq_core.kernels.triton.aot import SHARED_LIMIT

    gpu = torch.cuda.get_device_name() if context.device.type == "cuda" else "rehearsal"
    architecture = getattr(context.ours, "architecture", 90)
    targets = [(rows, name) for rows in context.sizes.timed_rows for name in context.sizes.shapes]
    began, limit = time.monotonic(), 100.0 if not context.rehearse else 1e9
    for i, (rows, name) in enumerate(targets):
        width, outputs = context.sizes.shapes[name]
        layer = context.layer(width, outputs, rank=QuantConfig().rank)
        inputs = [context.ours.rotate_quantize(each, layer) for each in context.copies(context.tokens(rows, width))]
        default = product.default_config(rows, outputs, width, layer.rank, architecture)
        shared = SHARED_LIMIT.get(architecture, min(SHARED_LIMIT.values()))
        configs = product.candidate_configs(rows, width, layer.rank, architecture, shared)
        # Those like the default in most sizes first.
        configs.sort(key=lambda config: sum(config.blocks.get(key) != size for key, size in default.blocks.items()))
        configs = configs[: 2 if context.rehearse else 12]
        deadline = time.monotonic() + (limit - (time.monotonic() - began)) / (len(targets) - i)
        run = functools.partial(context.ours.ternary_linear, layer=layer)
        expected = run(inputs[0], config=default)
        best = tuning.fastest(
            [default, *configs],
            lambda config, run=run, inputs=inputs: context.milliseconds(
                [functools.partial(run, each, config=config) for each in inputs]
            ),
            lambda config, run=run, x=inputs[0], expected=expected: torch.equal(run(x, config=config), expected),
            lambda deadline=deadline: time.monotonic() > deadline,
        )
        if best is not None:
            key = tuning.ternary_linear_key(rows, outputs, width, layer.rank)
            path = tuning.save_table(gpu, {key: best[0]})
            context.record(key=key, config=str(best[0]), ms=best[1], is_default=best[0] == default, table=str(path))


JOBS = (machine, compile, ops, forwards, forwards_again, forwards_fp32, forwards_bf16, counters, tune)
