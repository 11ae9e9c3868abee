"""Peers compute what FP32 computes, to what their format keeps, or say why they cannot."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import TINY
from torch import nn

from robuq_core.bench import peers
from robuq_core.bench.peers import PEERS, prepare
from robuq_core.bench.source import plain_network
from robuq_core.bench.timing import Unavailable, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

EAGER = ["fp32", "bf16", "int8-torchao", "int8-onednn"]
WIDE = TINY.model_copy(update={"hidden_size": 96})


def inputs_of(module: nn.Module) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        return (torch.randn(40, module.in_features, generator=generator),)
    return (torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([1, 900]), torch.tensor([0, 10]))


def make_module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(96, 64) if kind == "linear" else plain_network(WIDE)


def check(name: str, module: nn.Module, whole: bool) -> None:
    if "torchao" in name and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    inputs = inputs_of(module)
    with torch.inference_mode():
        expected = module(*inputs)
        call = PEERS[name].prepare(module, inputs)
        result = call()
        assert (0 if name.startswith("fp32") else 1e-4) <= relative_error(result, expected) <= PEERS[name].tolerance
        assert torch.equal(call(), result)
    # The module is shared by all peers: none may change it.
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("kind", ["linear", "network"])
def test_eager_peers_agree_with_fp32(name: str, kind: str) -> None:
    check(name, make_module(kind), kind == "network")


@pytest.mark.slow
def test_compiled_peers_agree_with_fp32() -> None:
    torch._dynamo.reset()
    check("fp32-compiled", make_module("network"), True)
    check("int8-torchao-compiled", make_module("linear"), False)


@pytest.mark.parametrize(
    ("ratio", "whole", "reason"),
    [
        (500.0, False, "500 times slower than FP32 on one small layer: no fast kernel"),
        (5.0, True, "5.0 times slower .* single layers only"),
        (3.0, False, None),
        (0.5, True, None),
    ],
)
def test_a_probe_decides_before_a_network_is_started(
    monkeypatch: pytest.MonkeyPatch, ratio: float, whole: bool, reason: str | None
) -> None:
    monkeypatch.setattr(peers, "probe", lambda *_: ratio)
    module = make_module("network" if whole else "linear")
    if reason is None:
        assert prepare(PEERS["bf16"], module, inputs_of(module), whole=whole)().dtype is torch.bfloat16
    else:
        with pytest.raises(Unavailable, match=reason):
            prepare(PEERS["bf16"], module, inputs_of(module), whole=whole)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler\nwith a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    for name, kind, reason in (
        ("int8-gemlite", "linear", "needs a CUDA GPU"),
        ("fp32-compiled", "linear", "nothing to fuse"),
        ("fp32-compiled", "network", r"torch\.compile failed: no C\+\+ compiler$"),
    ):
        module = make_module(kind)
        with pytest.raises(Unavailable, match=reason):
            prepare(PEERS[name], module, inputs_of(module), whole=kind == "network")
