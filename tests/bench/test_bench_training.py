import math

import pytest
from torch import nn

from bench.training import PLAIN, QAT, check_layers, measure, sides
from robuq_core.bench.timing import BenchError, Timer
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model

TINY = ModelConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3, learn_sigma=False
)


def test_every_side_is_timed_against_plain_training_and_learns() -> None:
    ticks = iter(range(10**6))
    # A clock that moves one second a look: every turn takes as long, so every side is as fast as plain training.
    timer = Timer(rounds=2, budget_s=math.inf, clock=lambda: float(next(ticks)))
    results, error = measure(TINY, 4, timer, steps=3, compiled=False)
    assert [each.name for each in results] == list(sides())
    assert {each.name: each.speed for each in results}[QAT] == 1
    assert all(each.steps_per_second == pytest.approx(3) for each in results)
    assert all(each.loss_after < each.loss_before for each in results)
    assert error <= 1e-5
    assert results[0].name == PLAIN


def test_a_forward_that_is_not_the_packed_one_is_no_figure() -> None:
    model = DiT(TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = quantize_model(model, QuantConfig(rank=2))
    assert check_layers(model) <= 1e-5
    layer = model.get_submodule("blocks.0.mlp.fc1")
    layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(BenchError, match=r"blocks\.0\.mlp\.fc1"):
        check_layers(model)
