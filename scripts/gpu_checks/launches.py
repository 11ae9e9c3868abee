"""Times of single kernels and of their candidate launch shapes; each result is checked before it is timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.check import BFLOAT16, Check
from robuq_core.bench.timing import relative_error
from robuq_core.config import QuantConfig
from robuq_core.kernels.ops import TernaryLayer
from robuq_core.quant.packing import unpack_planar

BF16_TOLERANCE = 1e-2
# Where a network with activations in bfloat16 has them: what such a layer reads, what it writes.
READ_NARROW, WRITTEN_NARROW = ("proj", "fc2"), ("qkv", "fc1")
SWEEP_S, TUNE_S = 45.0, 300.0


def time_linears(check: Check) -> dict[str, Any]:
    """Rotation, quantisation, product and low rank against a bare bf16 linear; each result is checked first.

    ``narrow_*``: what the layer takes in a network whose activations are bfloat16.
    """
    rows, rank, found = check.sizes.timed_rows, QuantConfig().rank, {}
    for name, (width, outputs) in check.sizes.shapes.items():
        x = check.normal(rows, width)
        layer, without = check.layer(width, outputs, rank=rank), check.layer(width, outputs, rank=0)
        halves = [tensor.bfloat16() for tensor in (x, check.normal(outputs, width), check.normal(outputs))]
        errors = _linear_errors(check, name, x, layer, halves)
        times = _linear_times(check, name, x, layer, without)
        times["bf16_ms"] = check.milliseconds(functools.partial(F.linear, *halves))
        ratios = {
            "over_bf16": times["bf16_ms"] / times["ours_ms"],
            "narrow_over_bf16": times["bf16_ms"] / times["narrow_ms"],
            "low_rank_share": 1 - times["rank_0_ms"] / times["ours_ms"],
        }
        found[name] = {"rows": rows, "rank": rank} | errors | times | ratios
    return found


def _ends(name: str) -> tuple[torch.dtype, torch.dtype]:
    """What a layer reads and writes in a network whose activations are bfloat16."""
    return (
        BFLOAT16 if name in READ_NARROW else torch.float32,
        BFLOAT16 if name in WRITTEN_NARROW else torch.float32,
    )


def _linear_errors(check: Check, name: str, x: Tensor, layer: TernaryLayer, halves: list[Tensor]) -> dict[str, float]:
    quantized, (_, written) = check.ours.rotate_quantize(x, layer), _ends(name)
    law = check.law.ternary_linear(quantized, layer)
    errors = {
        "relative_error": relative_error(check.ours.ternary_linear(quantized, layer), law),
        "narrow_error": relative_error(check.ours.ternary_linear(quantized, layer, written), law),
        "bf16_error": relative_error(F.linear(*halves), F.linear(*(tensor.float() for tensor in halves))),
    }
    assert errors["relative_error"] <= 1e-5, (name, errors)
    assert max(errors.values()) <= BF16_TOLERANCE, (name, errors)
    return errors


def _linear_times(check: Check, name: str, x: Tensor, layer: TernaryLayer, without: TernaryLayer) -> dict[str, float]:
    ops, (read, written) = check.ours, _ends(name)
    narrow, quantized, bare = x.to(read), ops.rotate_quantize(x, layer), ops.rotate_quantize(x, without)

    def both(x: Tensor, layer: TernaryLayer, dtype: torch.dtype = torch.float32) -> Tensor:
        return ops.ternary_linear(ops.rotate_quantize(x, layer), layer, dtype)

    calls = {
        "ours_ms": functools.partial(both, x, layer),
        "rank_0_ms": functools.partial(both, x, without),
        "rotate_quantize_ms": functools.partial(ops.rotate_quantize, x, layer),
        "ternary_linear_ms": functools.partial(ops.ternary_linear, quantized, layer),
        "ternary_linear_rank_0_ms": functools.partial(ops.ternary_linear, bare, without),
        "narrow_ms": functools.partial(both, narrow, layer, written),
        "narrow_rotate_quantize_ms": functools.partial(ops.rotate_quantize, narrow, layer),
        "narrow_ternary_linear_ms": functools.partial(ops.ternary_linear, quantized, layer, written),
    }
    return {name: check.milliseconds(call) for name, call in calls.items()}


def time_configs(check: Check) -> dict[str, Any]:
    """Launch shapes of the ternary product, packed and expanded to int8, and of attention: fastest first."""
    from robuq_core.kernels.triton import attention as heads_kernels
    from robuq_core.kernels.triton import ternary_linear as product

    rows, found = check.sizes.timed_rows, {}
    for name in (name for name in ("qkv", "fc2") if name in check.sizes.shapes):
        width, outputs = check.sizes.shapes[name]
        layer = check.layer(width, outputs, rank=QuantConfig().rank)
        x = check.ours.rotate_quantize(check.normal(rows, width), layer)
        expanded = unpack_planar(layer.planar, width).contiguous()
        forms = [("packed", None, torch.float32), ("int8", expanded, torch.float32)]
        for form, weight, dtype in [*forms, *([("packed, to bf16", None, BFLOAT16)] if name in WRITTEN_NARROW else [])]:
            run = functools.partial(_with_config, product.ternary_linear, x, layer, expanded=weight, dtype=dtype)
            configs = product.candidate_configs(rows, _shared_limit(check), weight is None)
            configs = configs if check.on_gpu else configs[:1]
            default = product.default_config(rows, outputs, check.architecture)
            found[f"{name}, {form}"] = _sweep(check, run, [default, *configs])
    images, length, heads, head_dim = check.sizes.heads[min(2, len(check.sizes.heads) - 1)]
    qkv = check.normal(images, length, 3 * heads * head_dim)
    configs = heads_kernels.candidate_configs(head_dim) if check.on_gpu else []
    for form, values in (("attention", qkv), ("attention, bf16", qkv.to(BFLOAT16))):
        run = functools.partial(_with_config, heads_kernels.attention, values, heads)
        found[form] = _sweep(check, run, [heads_kernels.default_config(head_dim), *configs])
    return found


def _shared_limit(check: Check) -> int:
    """Bytes of shared memory that a program of this GPU may take."""
    from robuq_core.kernels.triton.aot import SHARED_LIMIT

    return SHARED_LIMIT.get(check.architecture, min(SHARED_LIMIT.values()))


def tune(check: Check) -> dict[str, Any]:
    """Measure launch shapes of the ternary product for every bucket of rows, and keep what beats the default."""
    from robuq_core.kernels.triton import ternary_linear as product
    from robuq_core.kernels.triton import tuning

    began, table, found = time.perf_counter(), {}, {}
    buckets = product.ROW_BUCKETS if check.on_gpu else (16,)
    targets = [(rows, shape) for rows in buckets for shape in check.sizes.shapes]
    for i, (rows, name) in enumerate(targets):
        width, outputs = check.sizes.shapes[name]
        layer = check.layer(width, outputs, rank=QuantConfig().rank)
        x = check.ours.rotate_quantize(check.normal(rows, width), layer)
        default = product.default_config(rows, outputs, check.architecture)
        expected = product.ternary_linear(x, layer, default)
        run = functools.partial(_with_config, product.ternary_linear, x, layer)
        candidates = product.candidate_configs(rows, _shared_limit(check))
        # What is left of the time is shared among the targets that are left.
        deadline = time.perf_counter() + (TUNE_S - (time.perf_counter() - began)) / (len(targets) - i)
        best = tuning.fastest(
            [default, *(candidates if check.on_gpu else candidates[:1])],
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
    kept = str(tuning.save_table(torch.cuda.get_device_name(check.device), table)) if check.on_gpu else "nowhere"
    return {"kept_in": kept, "launches": found}


def _with_config(run: Callable[..., Tensor], *args: object, config: object, **named: object) -> Tensor:
    return run(*args, config=config, **named)


def _sweep(check: Check, run: Callable[..., Tensor], configs: Iterable[Any]) -> dict[str, Any]:
    """The first of ``configs`` is the default; the others must agree with it. Stops after :data:`SWEEP_S`."""
    default, *others = configs
    expected, began = run(config=default), time.perf_counter()
    # In bfloat16 a last bit of float32 may move a value by 2^-8.
    tolerance = 1e-5 if expected.dtype is torch.float32 else 1e-3
    timed: list[tuple[float, str]] = []
    failed = {}
    for i, config in enumerate(others):
        if time.perf_counter() - began > SWEEP_S:
            failed["untried"] = str(len(others) - i)
            break
        try:
            error = relative_error(run(config=config), expected)
            assert error <= tolerance, f"off by {error}"
            timed.append((check.milliseconds(functools.partial(run, config=config)), _text(config)))
        except Exception as reason:
            failed[_text(config)] = f"{type(reason).__name__}: {reason}"[:200]
    default_ms = check.milliseconds(functools.partial(run, config=default))
    return {"default": _text(default), "default_ms": default_ms, "fastest": sorted(timed)[:5], "failed": failed}


def _text(config: Any) -> str:
    return f"{config.blocks} warps={config.num_warps} stages={config.num_stages}"
