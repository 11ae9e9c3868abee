"""How fast: the device's ceilings, single ops, whole forwards, counters of the profiler, launch shapes."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import triton

from gpu_jobs.context import BFLOAT16, Context
from gpu_jobs.correctness import op_calls, results, watched
from robuq_core.bench.source import plain_network
from robuq_core.config import QuantConfig
from robuq_core.kernels.triton import ternary_linear, tuning
from robuq_core.kernels.triton.config import SHARED_LIMIT, LaunchConfig
from robuq_core.models.packed_dit import PackedDiT

TUNING_SECONDS, CANDIDATES = 100.0, 12


def machine(context: Context) -> None:
    """What it is, and two ceilings: bytes copied per second, bf16 products per second."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    gpu = str(torch.cuda.get_device_properties(0)) if context.device.type == "cuda" else None
    context.record(**versions, cuda=torch.version.cuda, gpu=gpu)
    if smi := shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=20)
        context.record(nvidia_smi=done.stdout.strip())
    size, n = (2**16, 64) if context.rehearse else (2**28, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target, a, b = torch.empty_like(source), *(context.normal(n, n).bfloat16() for _ in range(2))
    copy_ms = context.graphed_ms([lambda: target.copy_(source)])
    product_ms = context.graphed_ms([lambda: torch.mm(a, b)])
    context.record(copy_gb_per_s=2 * size / copy_ms / 1e6, bf16_tflops=2 * n**3 / product_ms / 1e9)


def compile(context: Context) -> None:
    """Fill Triton's cache with this process's share of what later jobs launch."""
    sizes = context.sizes
    for backend, count in context.share(list(product(context.network_backends.values(), sizes.batches))):
        context.network(backend, depth=1).forward(*context.inputs(count))
    for ops, rows in context.share(list(product((context.wide, context.narrow), sizes.timed_rows))):
        results(op_calls(context, ops, rows))
    context.wait()


def ops(context: Context) -> None:
    """Each op of a block, in both dtypes of activations, with and without low rank; cuBLAS in FP32, bf16 and int8."""
    for rows in context.sizes.timed_rows:
        for ops, rank in ((context.narrow, 16), (context.narrow, 0), (context.wide, 16)):
            calls = op_calls(context, ops, rows, rank, copies=True)
            found = {name: context.graphed_ms(each) for name, each in calls.items()}
            context.record(rows=rows, activations=ops.activations, rank=rank, ms=found)
        for name, width, outputs in context.sizes.shapes:
            x, weight = context.normal(rows, width), context.normal(outputs, width)
            narrow, ternary = weight.bfloat16(), weight.sign().to(torch.int8)
            peers = {
                "fp32": [partial(F.linear, each, weight) for each in context.copies(x)],
                "bf16": [partial(F.linear, each, narrow) for each in context.copies(x.bfloat16())],
                "int8": [partial(torch._int_mm, each, ternary.T) for each in context.copies(x.sign().to(torch.int8))],
            }
            found = {dtype: context.graphed_ms(calls) for dtype, calls in peers.items()}
            context.record(rows=rows, layer=name, cublas_ms=found)


def forwards(context: Context) -> None:
    """Ours, as it serves: recorded graphs. ``new_pairs_ms``: with timesteps and classes that were not met before."""
    packed: PackedDiT | None = None
    for name, backend in context.network_backends.items():
        packed = context.network(backend) if packed is None else packed.replica(backend)
        context.peak_bytes()
        for count in context.sizes.batches:
            run = partial(packed.forward, *context.inputs(count))
            found = {"wall_ms": context.wall_ms(run), "ms": context.event_ms(run), "peak_bytes": context.peak_bytes()}
            found["new_pairs_ms"] = context.wall_ms(lambda run=run, table=packed.conditioning: (table.clear(), run()))
            context.record(side=f"ours, {name}", rows=count, weight_bytes=packed.weight_bytes, **found)


def forwards_fp32(context: Context) -> None:
    """Eager FP32, without TF32: what the paper compares with."""
    plain = plain_network(context.sizes.model, context.device)
    for count in context.sizes.batches:
        run = partial(plain, *(torch.as_tensor(each, device=context.device) for each in context.inputs(count)))
        run()
        context.record(side="FP32 eager", rows=count, ms=context.event_ms(run), peak_bytes=context.peak_bytes())


def forwards_bf16(context: Context) -> None:
    """bf16 with each block compiled, the whole forward as one CUDA graph."""
    plain = plain_network(context.sizes.model, context.device, BFLOAT16)
    if context.device.type == "cuda":
        for block in plain.blocks:
            block.compile(dynamic=False)
    forward = plain.t_embedder.forward
    for count in context.sizes.batches:
        x, timesteps, classes = (torch.as_tensor(each, device=context.device) for each in context.inputs(count))
        run = partial(plain, x.bfloat16(), timesteps, classes)
        run()
        found = {"eager_ms": context.event_ms(run)}
        # Embedding the timestep copies from the host, which a graph cannot record; ours looks it up, too.
        embedded = forward(timesteps)
        plain.t_embedder.forward = lambda _, embedded=embedded: embedded
        found["ms"] = context.graphed_ms([run])
        plain.t_embedder.forward = forward
        context.record(side="bf16 compiled and graphed", rows=count, **found, peak_bytes=context.peak_bytes())


def counters(context: Context) -> None:
    """Nsight Compute on one launch of each kernel, into ``ncu.csv``."""
    sections = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis_Tables", "WarpStateStats")
    options = ["--clock-control", "none", "--csv", "--page", "details", "--kernel-name", "regex:_kernel$"]
    options += [f"--section={each}" for each in sections]
    if done := watched(context, "ncu", *options, "--log-file", str(context.out / "ncu.csv")):
        context.record(code=done.returncode, error=done.stderr[-800:])


def tune(context: Context) -> None:
    """Launch shapes of the ternary product: the likely first, kept if their bytes equal the default's.

    The table is saved in ``ROBUQ_CACHE_DIR`` after each shape, so that a run that is cut short has what it measured.
    """
    ours, rank = context.wide, QuantConfig().rank
    gpu = torch.cuda.get_device_name() if context.device.type == "cuda" else "rehearsal"
    targets = [(rows, *shape) for rows in context.sizes.timed_rows for shape in context.sizes.shapes]
    seconds = 1e9 if context.rehearse else TUNING_SECONDS / len(targets)
    for rows, _, width, outputs in targets:
        deadline = time.monotonic() + seconds
        layer = context.layer(width, outputs, rank=rank)
        inputs = [ours.rotate_quantize(each, layer) for each in context.copies(context.tokens(rows, width))]
        default = ternary_linear.default_config(rows, outputs, width, rank, ours.architecture)
        shared = SHARED_LIMIT.get(ours.architecture, min(SHARED_LIMIT.values()))
        configs = ternary_linear.candidate_configs(rows, width, rank, ours.architecture, shared)
        # Those like the default in most sizes first.
        configs.sort(key=lambda config: sum(config.blocks.get(key) != size for key, size in default.blocks.items()))
        expected = ours.ternary_linear(inputs[0], layer, config=default)
        times: list[tuple[float, LaunchConfig]] = []
        for config in (default, *configs[: 2 if context.rehearse else CANDIDATES]):
            calls = [partial(ours.ternary_linear, each, layer, config=config) for each in inputs]
            try:
                if torch.equal(calls[0](), expected):
                    times.append((context.graphed_ms(calls), config))
            except Exception as error:  # too much shared memory, too many registers: each library has errors of its own
                context.record(refused=str(config), error=repr(error)[:200])
            if time.monotonic() > deadline:
                break
        ms, best = min(times, key=lambda each: each[0])
        key = tuning.ternary_linear_key(rows, outputs, width, rank)
        path = tuning.save_table(gpu, {key: best})
        context.record(key=key, config=str(best), ms=ms, is_default=best == default, table=str(path))


JOBS = (machine, compile, ops, forwards, forwards_fp32, forwards_bf16, counters, tune)
