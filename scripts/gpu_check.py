"""Everything that needs a GPU to be known of the Triton backend, in one run: results first, then times.

    python scripts/gpu_check.py --out gpu_check.json

Parts are independent: one that fails is written down with its traceback, and the next one runs. The report is written
after every part. Ends with 1 if a part failed. ``--rehearse`` runs all of it at tiny sizes in Triton's interpreter,
without a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robuq_core.bench.source import random_checkpoint
from robuq_core.bench.timing import relative_error
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.files import replacing
from robuq_core.kernels.ops import Backend, Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.kernels.select import select_backend
from robuq_core.models.graphs import CudaRecorder, GraphedDenoise, Outputs
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.packing import pack_planar, unpack_planar

XL_SHAPES = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}
BF16_TOLERANCE, FORWARD_TOLERANCE, CODES_THAT_MAY_DIFFER = 1e-2, 0.05, 1e-3
SWEEP_S, TUNE_S = 45.0, 300.0


@dataclass(frozen=True)
class Sizes:
    """``widths`` of layers, ``rows`` of inputs, ``heads`` as (pictures, tokens, heads, head_dim)."""

    widths: tuple[int, ...]
    rows: tuple[int, ...]
    heads: tuple[tuple[int, int, int, int], ...]
    model: ModelConfig
    batches: tuple[int, ...]
    timed_rows: int
    shapes: dict[str, tuple[int, int]]


FULL = Sizes(
    widths=(36, 96, 288, 384, 768, 1152, 3072, 4608),
    rows=(1, 17, 130, 2048),
    heads=((1, 1, 1, 8), (3, 67, 2, 72), (2, 256, 16, 72), (2, 1024, 4, 64), (1, 130, 2, 160)),
    model=ModelConfig(depth=4),
    batches=(1, 2, 3, 8),
    timed_rows=2048,
    shapes=XL_SHAPES,
)
TINY = Sizes(
    widths=(36, 96),
    rows=(1, 9),
    heads=((2, 9, 2, 12),),
    model=ModelConfig(input_size=4, hidden_size=48, depth=1, num_heads=4, num_classes=10),
    batches=(1, 3),
    timed_rows=16,
    shapes={"proj": (36, 40)},
)


class Check:
    """The backends, the sizes, and what every part needs of them."""

    def __init__(self, rehearse: bool) -> None:
        self.sizes = TINY if rehearse else FULL
        self.ours: Backend = select_backend("triton")
        self.device = self.ours.device
        self.law = ReferenceBackend(self.device)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    @property
    def architecture(self) -> int:
        """Compute capability, 90 for 9.0; the interpreter passes for that."""
        major, minor = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (9, 0)
        return 10 * major + minor

    def layer(self, width: int, outputs: int, *, bits: int = 2, rank: int = 16, grid: Any = "midrise") -> TernaryLayer:
        weight = torch.randint(-1, 2, (outputs, width), generator=self.generator, dtype=torch.int8)
        a, b = self.normal(outputs, rank) * 0.02, self.normal(rank, width) * 0.02
        alpha, bias = self.normal(outputs).abs() * width**-0.5, self.normal(outputs)
        signs = random_signs(width, self.generator)
        return TernaryLayer(pack_planar(weight), alpha, bias, signs, a, b, bits, grid).to(self.device)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of one call inside a CUDA graph of many: no launch from the host in it, weights warm in L2."""
        if self.device.type == "cuda":
            from triton.testing import do_bench_cudagraph

            return float(do_bench_cudagraph(run, rep=20, return_mode="median"))
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)


def environment(check: Check) -> dict[str, Any]:
    import triton

    found = {"backend": check.ours.name, "torch": torch.__version__, "triton": triton.__version__}
    if check.device.type == "cuda":
        properties = torch.cuda.get_device_properties(check.device)
        found |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def rotate_quantize(check: Check) -> dict[str, Any]:
    """Codes may differ where a value lies on the edge of its cell; scales and low rank by rounding."""
    worst, rows = {"codes": 0.0, "scales": 0.0, "lowrank": 0.0}, check.sizes.rows[-1]
    for width, bits, grid, kind in _rotations(check.sizes.widths):
        layer = check.layer(width, 8, bits=bits, rank=3, grid=grid)
        x = check.normal(rows, width) * (1 + 9 * (torch.arange(width, device=check.device) == width // 2))
        prologue = _prologues(check, rows, width)[kind]
        ours, law = (ops.rotate_quantize(x, layer, prologue) for ops in (check.ours, check.law))
        found = {
            "codes": float((ours.codes != law.codes).float().mean()),
            "scales": relative_error(ours.scales, law.scales),
            "lowrank": relative_error(ours.lowrank, law.lowrank),
        }
        worst = {name: max(worst[name], found[name]) for name in worst}
    assert worst["codes"] <= CODES_THAT_MAY_DIFFER, worst
    assert max(worst["scales"], worst["lowrank"]) <= 1e-4, worst
    return {"worst": worst}


def _rotations(widths: tuple[int, ...]) -> list[tuple[int, int, str, int]]:
    """(width, bits, grid, prologue): all bits and grids at one width, all prologues at each. Each is a kernel to
    compile: all of the product would take longer than a short loan of a GPU."""
    kinds = [(bits, grid) for bits in range(1, 9) for grid in ("midrise", "midtread")]
    first = [(widths[0], *kind, i % 4) for i, kind in enumerate(kinds)]
    return first + [(width, *kinds[(5 * i + k) % 16], k) for i, width in enumerate(widths) for k in range(4)]


def _prologues(check: Check, rows: int, width: int) -> list[Prologue]:
    images = next(n for n in (4, 3, 2, 1) if rows % n == 0)
    return [None, "gelu", "silu", Modulation(check.normal(images, width), check.normal(images, width), 1e-6)]


def ternary_linear(check: Check) -> dict[str, Any]:
    """Bare integer products to the bit; whole outputs against float64."""
    worst, kinds = 0.0, ((1, 33, 0), (2, 1024, 16), (5, 131, 1), (7, 64, 32), (8, 200, 5))
    for i, width in enumerate(check.sizes.widths):
        for j, rows in enumerate(check.sizes.rows):
            for bits, outputs, rank in kinds if i == 0 else [kinds[(i + j) % len(kinds)]]:
                worst = max(worst, _product_error(check, rows, check.layer(width, outputs, bits=bits, rank=rank)))
    assert worst <= 1e-6, worst
    return {"worst_relative_error": worst}


def _product_error(check: Check, rows: int, layer: TernaryLayer) -> float:
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
    return relative_error(check.ours.ternary_linear(x, layer), exact)


def attention(check: Check) -> dict[str, Any]:
    """The law in float64 on the CPU; a probability on the edge between two codes may fall either way."""
    errors = {}
    for images, length, heads, head_dim in check.sizes.heads:
        qkv = check.normal(images, length, 3 * heads * head_dim)
        for quantized in (True, False):
            exact = ReferenceBackend().attention(qkv.cpu().double(), heads, quantized)
            error = relative_error(check.ours.attention(qkv, heads, quantized), exact)
            errors[f"{images}x{length}, {heads} heads of {head_dim}, {'8-bit' if quantized else 'float'}"] = error
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
    ops, rows = check.ours, check.sizes.rows[-1]
    broken = []
    for width in check.sizes.widths:
        layer, x = check.layer(width, 3 * width), check.normal(rows, width)
        weight, bias = check.normal(40, width), check.normal(40)
        whole = ops.rotate_quantize(x, layer)
        y, dense = ops.ternary_linear(whole, layer), ops.linear(x, weight, bias)
        for count in check.sizes.rows:
            first = min(5, rows - count)
            part = slice(first, first + count)
            again = ops.rotate_quantize(x[part], layer)
            same = {
                "codes": torch.equal(again.codes, whole.codes[part]),
                "scales": torch.equal(again.scales, whole.scales[part]),
                "lowrank": torch.equal(again.lowrank, whole.lowrank[part]),
                "product": torch.equal(ops.ternary_linear(again, layer), y[part]),
                "linear": torch.equal(ops.linear(x[part], weight, bias), dense[part]),
            }
            broken += [f"{name}, width {width}, {count} of {rows} rows" for name, kept in same.items() if not kept]
    for images, length, heads, head_dim in check.sizes.heads:
        qkv = check.normal(images, length, 3 * heads * head_dim)
        for quantized in (True, False):
            if not torch.equal(ops.attention(qkv[-1:], heads, quantized), ops.attention(qkv, heads, quantized)[-1:]):
                broken.append(f"attention {length}x{head_dim}, quantized={quantized}")
    assert not broken or check.device.type != "cuda", broken
    return {"broken": broken}


def _network(check: Check, backend: Backend) -> PackedDiT:
    found = random_checkpoint(check.sizes.model, QuantConfig())
    return PackedDiT(check.sizes.model, found.dense, found.layers, backend)


def _rows(check: Check, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    config = check.sizes.model
    x = check.normal(rows, config.in_channels, config.input_size, config.input_size)
    return x, 37 * torch.arange(rows) % 1000, torch.arange(rows) % config.num_classes


def forward(check: Check) -> dict[str, Any]:
    """A packed network against the reference's; and recorded as graphs, to the bit, alone and among others."""
    ours, law = _network(check, check.ours), _network(check, check.law)
    graphed = GraphedDenoise(ours.denoise, CudaRecorder(check.device) if check.device.type == "cuda" else _run_again)
    result: dict[str, Any] = {"relative_error": {}, "graphs_equal": {}, "alone_equal": {}}
    for rows in check.sizes.batches:
        x, timesteps, classes = _rows(check, rows)
        slots, table = ours.conditioning.slots(timesteps.tolist(), classes.tolist()), ours.conditioning.table
        eager, _ = ours.denoise(x, slots, table)
        places = law.conditioning.slots(timesteps.tolist(), classes.tolist())
        expected, _ = law.denoise(x, places, law.conditioning.table)
        result["relative_error"][rows] = relative_error(eager, expected)
        result["graphs_equal"][rows] = torch.equal(graphed(x, slots, table)[0], eager)
        result["alone_equal"][rows] = torch.equal(ours.denoise(x[-1:], slots[-1:], table)[0], eager[-1:])
    assert max(result["relative_error"].values()) <= FORWARD_TOLERANCE, result
    if check.device.type == "cuda":
        assert all(result["graphs_equal"].values()), result
        assert all(result["alone_equal"].values()), result
    return result


def _run_again(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    first, second = (out.clone() for out in run())

    def replay() -> None:
        for out, result in zip((first, second), run(), strict=True):
            out.copy_(result)

    return replay, (first, second)


def time_linears(check: Check) -> dict[str, Any]:
    """Rotation, quantisation, product and low rank against a bare bf16 linear; each result is checked first."""
    rows, ops, found = check.sizes.timed_rows, check.ours, {}
    for name, (width, outputs) in check.sizes.shapes.items():
        x, rank = check.normal(rows, width), QuantConfig().rank
        layer, without = check.layer(width, outputs, rank=rank), check.layer(width, outputs, rank=0)
        quantized, bare = ops.rotate_quantize(x, layer), ops.rotate_quantize(x, without)
        error = relative_error(ops.ternary_linear(quantized, layer), check.law.ternary_linear(quantized, layer))
        assert error <= 1e-5, (name, error)
        weight, bias = check.normal(outputs, width), check.normal(outputs)
        halves = [tensor.bfloat16() for tensor in (x, weight, bias)]
        bf16_error = relative_error(F.linear(*halves), F.linear(x, weight, bias))
        assert bf16_error <= BF16_TOLERANCE, (name, bf16_error)

        def both(x: Tensor, layer: TernaryLayer) -> Tensor:
            return ops.ternary_linear(ops.rotate_quantize(x, layer), layer)

        times = {
            "bf16_ms": check.milliseconds(functools.partial(F.linear, *halves)),
            "ours_ms": check.milliseconds(functools.partial(both, x, layer)),
            "rank_0_ms": check.milliseconds(functools.partial(both, x, without)),
            "rotate_quantize_ms": check.milliseconds(functools.partial(ops.rotate_quantize, x, layer)),
            "ternary_linear_ms": check.milliseconds(functools.partial(ops.ternary_linear, quantized, layer)),
            "ternary_linear_rank_0_ms": check.milliseconds(functools.partial(ops.ternary_linear, bare, without)),
        }
        ratios = {
            "over_bf16": times["bf16_ms"] / times["ours_ms"],
            "low_rank_share": 1 - times["rank_0_ms"] / times["ours_ms"],
        }
        found[name] = {"rows": rows, "rank": rank, "relative_error": error, "bf16_error": bf16_error} | times | ratios
    return found


def time_configs(check: Check) -> dict[str, Any]:
    """Launch shapes of the ternary product, packed and expanded to int8, and of attention: fastest first."""
    from robuq_core.kernels.triton import attention as heads_kernels
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton.aot import SHARED_LIMIT

    rows, found = check.sizes.timed_rows, {}
    architecture = check.architecture
    limit = SHARED_LIMIT.get(architecture, min(SHARED_LIMIT.values()))
    for name in ("qkv", "fc2") if len(check.sizes.shapes) > 1 else check.sizes.shapes:
        width, outputs = check.sizes.shapes[name]
        layer = check.layer(width, outputs, rank=QuantConfig().rank)
        x = check.ours.rotate_quantize(check.normal(rows, width), layer)
        expanded = unpack_planar(layer.planar, width).contiguous()
        for form, weight in (("packed", None), ("int8", expanded)):
            run = functools.partial(_with_config, product.ternary_linear, x, layer, expanded=weight)
            configs = product.candidate_configs(rows, limit, weight is None)
            configs = configs if check.device.type == "cuda" else configs[:1]
            default = product.default_config(rows, outputs, architecture)
            found[f"{name}, {form}"] = _sweep(check, run, [default, *configs])
    images, length, heads, head_dim = check.sizes.heads[min(2, len(check.sizes.heads) - 1)]
    qkv = check.normal(images, length, 3 * heads * head_dim)
    run = functools.partial(_with_config, heads_kernels.attention, qkv, heads)
    configs = heads_kernels.candidate_configs(head_dim) if check.device.type == "cuda" else []
    found["attention"] = _sweep(check, run, [heads_kernels.default_config(head_dim), *configs])
    return found


def tune(check: Check) -> dict[str, Any]:
    """Measure launch shapes of the ternary product for every bucket of rows, and keep what beats the default."""
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton import tuning
    from robuq_core.kernels.triton.aot import SHARED_LIMIT

    limit = SHARED_LIMIT.get(check.architecture, min(SHARED_LIMIT.values()))
    on_gpu = check.device.type == "cuda"
    began, table, found = time.perf_counter(), {}, {}
    targets = [(rows, shape) for rows in product.ROW_BUCKETS if on_gpu or rows == 16 for shape in check.sizes.shapes]
    for i, (rows, name) in enumerate(targets):
        width, outputs = check.sizes.shapes[name]
        layer = check.layer(width, outputs, rank=QuantConfig().rank)
        x = check.ours.rotate_quantize(check.normal(rows, width), layer)
        default = product.default_config(rows, outputs, check.architecture)
        expected = product.ternary_linear(x, layer, default)
        run = functools.partial(_with_config, product.ternary_linear, x, layer)
        candidates = product.candidate_configs(rows, limit)
        # What is left of the time is shared among the targets that are left.
        deadline = time.perf_counter() + (TUNE_S - (time.perf_counter() - began)) / (len(targets) - i)
        best = tuning.fastest(
            [default, *(candidates if on_gpu else candidates[:1])],
            lambda config, run=run: check.milliseconds(functools.partial(run, config=config)),
            # To the byte: a tuned launch must not change a row's result.
            lambda config, run=run, expected=expected: torch.equal(run(config=config), expected),
            lambda deadline=deadline: time.perf_counter() > deadline,
        )
        if best is not None:
            key = tuning.ternary_linear_key(rows, outputs, width, layer.rank)
            found[key] = {"config": _text(best[0]), "ms": best[1], "is_default": best[0] == default}
            table[key] = best[0]
    # Times of a rehearsal mean nothing, so they are not kept.
    kept = str(tuning.save_table(torch.cuda.get_device_name(check.device), table)) if on_gpu else "nowhere"
    return {"kept_in": kept, "launches": found}


def _with_config(run: Callable[..., Tensor], *args: object, config: object, **named: object) -> Tensor:
    return run(*args, config=config, **named)


def _sweep(check: Check, run: Callable[..., Tensor], configs: Iterable[Any]) -> dict[str, Any]:
    """The first of ``configs`` is the default; the others must agree with it. Stops after :data:`SWEEP_S`."""
    default, *others = configs
    expected, began = run(config=default), time.perf_counter()
    timed: list[tuple[float, str]] = []
    failed = {}
    for i, config in enumerate(others):
        if time.perf_counter() - began > SWEEP_S:
            failed["untried"] = str(len(others) - i)
            break
        try:
            error = relative_error(run(config=config), expected)
            assert error <= 1e-5, f"off by {error}"
            timed.append((check.milliseconds(functools.partial(run, config=config)), _text(config)))
        except Exception as reason:
            failed[_text(config)] = f"{type(reason).__name__}: {reason}"[:200]
    default_ms = check.milliseconds(functools.partial(run, config=default))
    return {"default": _text(default), "default_ms": default_ms, "fastest": sorted(timed)[:5], "failed": failed}


def _text(config: Any) -> str:
    return f"{config.blocks} warps={config.num_warps} stages={config.num_stages}"


def time_forward(check: Check) -> dict[str, Any]:
    network, found = _network(check, check.ours), {}
    graphed = GraphedDenoise(network.denoise, CudaRecorder(check.device) if check.device.type == "cuda" else _run_again)
    for rows in check.sizes.batches:
        x, timesteps, classes = _rows(check, rows)
        slots, table = network.conditioning.slots(timesteps.tolist(), classes.tolist()), network.conditioning.table
        found[rows] = {
            name: min(_wall_milliseconds(check, functools.partial(run, x, slots, table)) for _ in range(3))
            for name, run in (("eager_ms", network.denoise), ("graphed_ms", graphed))
        }
    return {"depth": check.sizes.model.depth, "rows": found}


def _wall_milliseconds(check: Check, run: Callable[[], object]) -> float:
    """A forward as the host sees it."""
    calls = 10 if check.device.type == "cuda" else 1
    run()
    _wait(check)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(check)
    return 1e3 * (time.perf_counter() - began) / calls


def _wait(check: Check) -> None:
    if check.device.type == "cuda":
        torch.cuda.synchronize(check.device)


PARTS = (
    *(environment, rotate_quantize, ternary_linear, attention, dense_linear, rows_are_their_own, forward),
    *(time_linears, time_forward, time_configs),
    tune,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="only these")
    parser.add_argument("--tune", action="store_true", help="also measure launch shapes and keep them for this GPU")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is later
    torch.backends.cuda.matmul.allow_tf32 = False
    check, report = Check(arguments.rehearse), {}
    for part in PARTS:
        if arguments.parts and part.__name__ not in arguments.parts:
            continue
        if part is tune and not (arguments.tune or arguments.parts):
            continue
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                outcome = {"ok": True, **part(check)}
        except Exception:
            outcome = {"ok": False, "error": traceback.format_exc()}
        outcome["seconds"] = round(time.perf_counter() - began, 2)
        report[part.__name__] = outcome
        print(f"{part.__name__}: {'ok' if outcome['ok'] else 'FAILED'} in {outcome['seconds']} s", flush=True)
        if not outcome["ok"]:
            print(outcome["error"], flush=True)
        with replacing(arguments.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 0 if all(outcome["ok"] for outcome in report.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
