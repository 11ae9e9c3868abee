"""The others: what a user could run instead, made from the same FP32 module.

A peer takes a module and its inputs and gives a call to time. It raises :class:`Unavailable` with the reason where it
cannot run. Integer and bf16 kernels fall to reference loops on processors without their instructions, hundreds of times
slower than FP32; a probe on one small layer finds that out before a whole network is started.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.bench.report import BASELINE
from robuq_core.bench.source import cast, cast_network
from robuq_core.bench.timing import Timer, Unavailable

Inputs = tuple[Tensor, ...]
Call = Callable[[], Tensor]

# Beyond this many times FP32 on a small layer a peer is skipped; beyond the second, of all but single layers.
HOPELESS_RATIO, SLOW_RATIO = 20.0, 3.0
_PROBE_ROWS, _PROBE_WIDTH = 256, 512


@dataclass(frozen=True)
class Peer:
    """``tolerance``: relative error against FP32 that its number format explains. ``probed``: its kernels may be
    reference loops here. ``whole``: not worth it on one layer."""

    name: str
    prepare: Callable[[nn.Module, Inputs], Call]
    tolerance: float
    probed: bool = False
    whole: bool = False


def _run(module: Callable[..., Tensor], inputs: Inputs) -> Call:
    return lambda: module(*inputs)


def _compiled(module: nn.Module, inputs: Inputs) -> Call:
    """Inductor at its best: constants frozen on a CPU, tuned and captured in CUDA graphs on a GPU."""
    from torch._inductor import config

    on_gpu = inputs[0].is_cuda
    try:
        compiled = torch.compile(module, dynamic=False, mode="max-autotune" if on_gpu else None)
        with config.patch(freezing=not on_gpu), torch.inference_mode():
            compiled(*inputs)
    except Exception as error:  # whatever a compiler may raise: no C++ compiler, an operator without lowering
        raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0][:200]}") from error
    return _run(compiled, inputs)


def _bf16(module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    return cast_network(copy.deepcopy(module), torch.bfloat16), cast(inputs, torch.bfloat16)


def _torchao(module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    if importlib.util.find_spec("torchao") is None:
        raise Unavailable("not installed; from a checkout: pip install '.[bench]'")
    with _quiet():
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
        from torchao.utils import should_reduce_range

        # On a GPU its kernels take bf16 activations.
        chosen, taken = _bf16(module, inputs) if inputs[0].is_cuda else (copy.deepcopy(module), inputs)
        holder = nn.Sequential(chosen) if isinstance(chosen, nn.Linear) else chosen
        # Without VNNI its sums would overflow 16 bits.
        quantize_(holder, Int8DynamicActivationInt8WeightConfig(reduce_range=should_reduce_range(inputs[0].device)))
    return holder, taken


def _onednn(module: nn.Module, inputs: Inputs) -> Call:
    """Unsigned activations with a zero point, signed weights by tensor: oneDNN's fast form without AMX too."""
    if inputs[0].is_cuda:
        raise Unavailable("a CPU library")
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise Unavailable("this torch is built without oneDNN")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        with _quiet():
            quantize: Any = torch.ao.quantization.quantize_dynamic
            quantized = quantize(nn.Sequential(module), {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
    return _run(quantized[0], inputs)


def _gemlite(module: nn.Module, inputs: Inputs) -> Call:
    if not inputs[0].is_cuda:
        raise Unavailable("needs a CUDA GPU")
    if importlib.util.find_spec("gemlite") is None:
        raise Unavailable("not installed: pip install gemlite")
    from gemlite.helper import A8W8_int8_dynamic  # type: ignore[import-not-found]

    holder, taken = _bf16(nn.Sequential(module), inputs)
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, A8W8_int8_dynamic(device=str(inputs[0].device)).from_linear(child))
    return _run(holder, taken)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(BASELINE, _run, 1e-6),
        Peer("fp32-compiled", _compiled, 1e-4, whole=True),
        Peer("bf16", lambda module, inputs: _run(*_bf16(module, inputs)), 0.05, probed=True),
        Peer("bf16-compiled", lambda m, x: _compiled(*_bf16(m, x)), 0.05, probed=True, whole=True),
        Peer("int8-torchao", lambda m, x: _run(*_torchao(m, x)), 0.1, probed=True),
        Peer("int8-torchao-compiled", lambda m, x: _compiled(*_torchao(m, x)), 0.1, probed=True, whole=True),
        Peer("int8-onednn", _onednn, 0.2, probed=True),
        Peer("int8-gemlite", _gemlite, 0.1),
    )
}


def prepare(peer: Peer, module: nn.Module, inputs: Inputs, *, whole: bool) -> Call:
    """``peer``'s call for ``module``, which stays as it is.

    Args:
        whole: ``module`` is a block or a network, not one layer.

    Raises:
        Unavailable: it cannot run here, or it is not worth waiting for.
    """
    if peer.whole and not whole:
        raise Unavailable("nothing to fuse in one layer")
    if peer.probed:
        ratio = probe(peer.name, inputs[0].device, torch.get_num_threads())
        if ratio > HOPELESS_RATIO:
            raise Unavailable(f"{ratio:.0f} times slower than FP32 on one small layer: no fast kernel on this machine")
        if whole and ratio > SLOW_RATIO:
            raise Unavailable(f"{ratio:.1f} times slower than FP32 on one small layer: timed on single layers only")
    return peer.prepare(module, inputs)


@lru_cache(maxsize=32)
@torch.inference_mode()
def probe(name: str, device: torch.device, threads: int) -> float:
    """How many times slower than FP32 a peer is on a layer of 512 x 512 and 256 rows.

    Raises:
        Unavailable: it cannot run here.
    """
    del threads  # part of the key alone
    module = nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH).to(device)
    inputs = (torch.randn(_PROBE_ROWS, _PROBE_WIDTH, device=device),)
    timer = Timer.of(device)

    def best(call: Call) -> float:
        call()
        return min(timer.seconds(call) for _ in range(5))

    return best(PEERS[name].prepare(module, inputs)) / best(_run(module, inputs))


@contextmanager
def _quiet() -> Any:
    """Without the warnings that these libraries print on import and on every call."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
