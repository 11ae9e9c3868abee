import pytest
import torch
from torch import nn

from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears, quantize_model
from robuq_core.quant.hadamard import random_signs

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


def test_every_parameter_learns() -> None:
    _, layer = _layer(2, 8)
    layer(torch.randn(5, 96)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


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


def test_quantising_is_seeded_by_the_configuration() -> None:
    def signs(seed: int) -> torch.Tensor:
        torch.manual_seed(99)
        model = quantize_model(DiT(SMALL), QuantConfig(rank=0, seed=seed))
        return model.get_submodule("blocks.1.mlp.fc2").rotation.signs

    assert torch.equal(signs(1), signs(1))
    assert not torch.equal(signs(1), signs(2))


def test_unknown_layers_and_second_quantisation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.fc1"):
        quantize_model(DiT(SMALL), QuantConfig(rank=0, bits={"blocks.9.mlp.fc1": 2}))
    model = quantize_model(DiT(SMALL), QuantConfig(rank=0))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, QuantConfig(rank=0))
