"""What is observed is what the layers are given, whichever form the model has."""

from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_model, write_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantizable_linears, quantize_model
from train.diagnose.run import layer_inputs, observed, observed_packed


def points() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([5, 500, 900]), torch.tensor([1, 10, 4])


def seen_by(model: DiT) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), observed(model, lambda name, tokens: seen.setdefault(name, []).append(tokens.clone())):
        model(*points())
        linear = next(module for _, module in quantizable_linears(model))
    assert not linear._forward_pre_hooks
    return seen


def test_every_block_linear_is_seen_once_a_forward() -> None:
    model = tiny_model()
    seen = seen_by(model)
    assert list(seen) != []
    assert set(seen) == {name for name, _ in quantizable_linears(model)}
    for name, found in seen.items():
        rows = 3 if "adaLN" in name else 3 * TINY.num_tokens
        width = 4 * 48 if name.endswith("fc2") else 48
        assert [tokens.shape for tokens in found] == [(rows, width)]


def test_what_is_seen_is_what_the_layer_computes_from() -> None:
    model = tiny_model()
    name = "blocks.1.mlp.fc1"
    layer = model.get_submodule(name)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    seen = seen_by(model)[name][0]
    with torch.no_grad():
        torch.testing.assert_close(layer(seen), outputs[0].flatten(0, -2))


@pytest.mark.parametrize("rotation", ["all", "proj_fc2"])
def test_a_plain_model_is_shown_as_it_would_be_quantised(rotation: str) -> None:
    quant = QuantConfig(rank=2, rotation=rotation, activation_bits=3, bits={"blocks.0.mlp.fc2": 1})
    torch.manual_seed(0)
    plain = DiT(TINY)
    found = layer_inputs(plain, quant)
    student = quantize_model(plain, quant)
    assert list(found) == [name for name, _ in quantizable_linears(student)]
    x = torch.randn(4, 48)
    for name, layer in quantizable_linears(student):
        assert isinstance(layer, QuantLinear)
        assert (found[name].bits, found[name].grid, found[name].rule) == (layer.bits, layer.grid, layer.activation)
        tokens = F.pad(x, (0, layer.weight.shape[1] - 48))
        assert torch.equal(found[name].rotation(tokens), layer.rotation(tokens))
    assert (
        layer_inputs(student, quant)["blocks.0.mlp.fc2"].rotation is student.get_submodule("blocks.0.mlp.fc2").rotation
    )


def test_a_packed_model_is_seen_as_the_student_it_was(tmp_path: Path) -> None:
    student = write_tiny(tmp_path / "tiny.safetensors")
    for parameter_name, parameter in student.named_parameters():
        if not parameter_name.startswith("blocks."):
            parameter.data = parameter.data.half().float()  # as the file keeps them
    expected = seen_by(student)
    model, backend, inputs = observed_packed(read_checkpoint(tmp_path / "tiny.safetensors"))
    seen: dict[str, list[Tensor]] = {}
    backend.observe = lambda name, tokens: seen.setdefault(name, []).append(tokens.clone())
    model.forward(*points())
    assert set(seen) == set(expected) == set(inputs)
    # The first block's inputs are those of the student to rounding; later ones may differ by a code that tipped over.
    for name in ("blocks.0.attn.qkv", "blocks.0.adaLN_modulation.1"):
        torch.testing.assert_close(seen[name][0], expected[name][0], rtol=0.02, atol=0.02)
    for name, each in layer_inputs(student, QuantConfig(rank=4)).items():
        tokens = torch.randn(2, each.width)
        torch.testing.assert_close(inputs[name].rotation(tokens), each.rotation(tokens))
        assert (inputs[name].bits, inputs[name].grid) == (each.bits, each.grid)


def test_a_linear_outside_of_the_blocks_is_none_of_it() -> None:
    model = tiny_model()
    assert isinstance(model.x_embedder, nn.Linear)
    assert "x_embedder" not in layer_inputs(model, QuantConfig())
