import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robuq_core.config import ModelConfig, QuantConfig, RotatedLinears
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears, quantize_model
from robuq_core.quant.activation import fake_quantize_activation
from robuq_core.quant.choices import ActivationRule, LowRankInit
from robuq_core.quant.hadamard import random_signs
from robuq_core.quant.ternary import ternary_fake_quantize

SMALL = ModelConfig(input_size=8, patch_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=5)


def _layer(bits: int, rank: int) -> tuple[nn.Linear, QuantLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    signs = random_signs(96, torch.Generator().manual_seed(1))
    return linear, QuantLinear(
        linear, bits=bits, grid="midrise", weight_scale="conditional_mean", rank=rank, signs=signs
    )


def test_more_rank_and_more_bits_come_closer_to_the_layer() -> None:
    x = torch.randn(64, 96)

    @torch.no_grad()
    def error(bits: int, rank: int) -> float:
        linear, quantised = _layer(bits, rank)
        return float((quantised(x) - linear(x)).norm() / linear(x).norm())

    assert error(8, 0) > error(8, 16) > error(8, 32)
    assert error(1, 16) > error(2, 16) > error(3, 16) > error(6, 16)


def test_blocks_are_quantised_and_the_rest_is_not() -> None:
    model = quantize_model(DiT(SMALL), QuantConfig(rank=3, adaln_rank=2, bits={"blocks.1.mlp.fc1": 1}))
    layers = dict(quantizable_linears(model))
    assert len(layers) == 10
    assert all(isinstance(layer, QuantLinear) for layer in layers.values())
    bits = {name: layer.bits for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    assert (bits["blocks.0.attn.qkv"], bits["blocks.0.adaLN_modulation.1"], bits["blocks.1.mlp.fc1"]) == (2, 4, 1)
    assert isinstance(model.final_layer.linear, nn.Linear)
    assert isinstance(model.final_layer.adaLN_modulation[1], nn.Linear)
    assert model.blocks[0].attn.quantized


def test_signs_are_seeded_by_the_configuration_alone() -> None:
    def signs(**quant: Any) -> torch.Tensor:
        model = quantize_model(DiT(SMALL), QuantConfig(**{"rank": 3, **quant}))
        return model.get_submodule("blocks.1.mlp.fc2").rotation.signs

    assert torch.equal(signs(), signs(lowrank_init="zero"))
    assert not torch.equal(signs(), signs(seed=2))


def test_unknown_layers_and_second_quantisation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.fc1"):
        quantize_model(DiT(SMALL), QuantConfig(rank=0, bits={"blocks.9.mlp.fc1": 2}))
    model = quantize_model(DiT(SMALL), QuantConfig(rank=0))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, QuantConfig(rank=0))


@pytest.mark.parametrize("activation", ["gaussian", "lloyd_max", "minmax"])
@pytest.mark.parametrize("rotation", ["all", "proj_fc2", "none"])
@pytest.mark.parametrize("lowrank_init", ["svd", "zero"])
def test_every_ablation_learns_and_eight_bits_are_near(
    activation: ActivationRule, rotation: RotatedLinears, lowrank_init: LowRankInit
) -> None:
    torch.manual_seed(0)
    model = DiT(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = QuantConfig(
        activation_bits=8, adaln_bits=8, activation=activation, rotation=rotation, rank=4, lowrank_init=lowrank_init
    )
    student = quantize_model(copy.deepcopy(model), config)
    # Without the ternary weights' own error: what is left is that of eight-bit activations.
    for _, layer in quantizable_linears(student):
        assert isinstance(layer, QuantLinear)
        assert layer.activation == activation
        layer.register_forward_hook(_with_whole_weight)
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 5])
    expected, found = model(x, t, y), student(x, t, y)
    # The step for a normal cuts off what an unrotated token has far out, at eight bits too.
    limit = 0.06 if rotation == "all" or activation == "minmax" else 0.12
    assert float((found - expected).norm() / expected.norm()) < limit
    found.square().sum().backward()
    # A zero A passes no gradient to B, by design; all else learns from the first step.
    assert all(
        bool(p.grad.any())
        for name, p in student.named_parameters()
        if not name.endswith("lowrank_b") and p.grad is not None
    )


def _with_whole_weight(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer, QuantLinear)
    rotated = layer.rotation(inputs[0])
    quantised = fake_quantize_activation(rotated, layer.bits, layer.grid, layer.activation)
    missing = layer.weight - ternary_fake_quantize(layer.weight, layer.weight_scale)
    return output + F.linear(quantised, missing)


def test_ablations_of_the_rotation_name_their_linears() -> None:
    model = quantize_model(DiT(SMALL), QuantConfig(rank=0, rotation="proj_fc2"))
    rotated = {name for name, layer in quantizable_linears(model) if layer.rotation.block is None}
    assert rotated == {f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn.proj", "mlp.fc2")}
