"""What is watched is what the layers compute from; statistics against closed forms; the command and its report."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import make_config, train, write_config
from tiny import TINY, tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

from robuq_core.models.quant_linear import QuantLinear, quantizable_linears
from robuq_core.quant.activation import SIGMA_PER_MEAN_ABS, fake_quantize_activation
from train.cli import app
from train.config import TrainConfig
from train.diagnose import BITS, Shape, Watch, diagnose, diagnose_layer, measure_heads, shape_of, watched
from train.evaluation.networks import EvaluationError
from train.run import Run

LAYERS = ["adaLN_modulation.1", "attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]


def layer_of(weight: Tensor, bits: int = 2) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.weight.data = weight
    ones = torch.ones(weight.shape[1])
    return QuantLinear(linear, bits=bits, grid="midrise", weight_scale="conditional_mean", rank=0, signs=ones,
                       weight_planes=3)  # fmt: skip


ANY = layer_of(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))


def normals(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def test_a_normal_is_found_normal_at_any_scale() -> None:
    """With the published distortions of the optimal uniform quantiser."""
    found = shape_of(normals(200, 4608) * torch.logspace(-6, 6, 200)[:, None], ANY)
    assert found.tokens == 200
    assert (found.skew, found.kurtosis) == pytest.approx((0, 0), abs=0.02)
    assert found.ks < 0.003
    assert [found.error[bits] for bits in (1, 2, 3, 4)] == pytest.approx([0.36338, 0.11885, 0.03744, 0.01154], rel=0.01)
    assert all(quantile == pytest.approx(normal, abs=0.05) for normal, quantile in found.quantiles if abs(normal) < 3)
    assert sum(found.density) * 0.1 == pytest.approx(1, abs=1e-4)


def test_two_values_and_a_uniform_token_have_their_moments() -> None:
    two = shape_of(torch.tensor([[1.0, -1.0] * 50]), ANY)
    assert (two.skew, two.kurtosis) == pytest.approx((0, -2))
    at = 1 / SIGMA_PER_MEAN_ABS  # all mass at +-0.798 of its sigma
    assert two.ks == pytest.approx(0.5 * math.erf(at / math.sqrt(2)), abs=2e-3)
    uniform = shape_of(torch.linspace(-1, 1, 4001)[None], ANY)
    assert uniform.kurtosis == pytest.approx(-1.2, abs=0.01)
    end = 2 / SIGMA_PER_MEAN_ABS
    z = torch.linspace(-end, end, 20001, dtype=torch.float64)
    assert uniform.ks == pytest.approx(float(((z + end) / (2 * end) - torch.special.ndtr(z)).abs().max()), abs=2e-3)


def test_an_outlier_shows_in_every_figure() -> None:
    x = normals(50, 512)
    plain = shape_of(x, ANY)
    x[:, 7] = 80
    found = shape_of(x, ANY)
    assert found.kurtosis > 100
    assert found.skew > 5
    assert found.ks > 2 * plain.ks
    assert found.error[2] > 2 * plain.error[2]


@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS))
def test_the_error_is_that_of_the_quantiser(seed: int, bits: int) -> None:
    x = normals(5, 48, seed) ** 3
    lost = (x - fake_quantize_activation(x, bits)).square().sum(dim=1) / x.square().sum(dim=1)
    assert shape_of(x, ANY).error[bits] == pytest.approx(float(lost.mean()), rel=1e-5)


def test_the_error_of_the_output_shows_where_rotation_hurts() -> None:
    """Two outlier channels: with weights of usual size rotation helps, with weights as small as they are large, not.

    The error of the input calls rotation better in both."""
    tokens, weight = normals(200, 64), normals(32, 64, seed=1)
    tokens[:, :2] *= 30
    usual = diagnose_layer("a", layer_of(weight.clone()), tokens)
    weight[:, :2] /= 30
    small = diagnose_layer("a", layer_of(weight), tokens)
    assert not usual.rotation_hurts
    assert small.rotation_hurts
    for layer in (usual, small):
        assert layer.after.error[2] < layer.before.error[2]


def test_tokens_of_zeros_are_left_out() -> None:
    tokens, layer = normals(4, 8), layer_of(normals(3, 8, seed=1))
    padded = torch.cat([tokens, torch.zeros(3, 8)])
    assert diagnose_layer("a", layer, padded) == diagnose_layer("a", layer, tokens)
    with pytest.raises(EvaluationError, match="the input of a is always zero"):
        diagnose_layer("a", layer, torch.zeros(3, 8))


def test_a_head_is_measured_by_the_spread_of_its_logits_and_its_error() -> None:
    qkv = torch.randn(6, 128, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    qkv[:, :, 0, 1] *= 3
    variance, lost, exact = measure_heads(qkv.flatten(2), 2)
    assert (variance / 6).sqrt().tolist() == pytest.approx([1, 3], rel=0.1)
    assert 0.002 < float((lost[0] / exact[0]).sqrt()) < 0.02


def test_what_is_watched_is_what_the_layers_compute_from() -> None:
    model, name = tiny_model(), "blocks.1.mlp.fc1"
    outputs: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    points = normals(9, 256).reshape(3, 3, 16, 16), torch.tensor([5, 500, 900]), torch.tensor([1, 10, 4])
    found = []
    for share, seed in ((1000, 0), (10, 0), (10, 0), (10, 1)):
        watch = Watch(TINY.num_heads, share, seed)
        with torch.no_grad(), watched(model, watch):
            model(*points)
            model(*points)
        found.append({layer: torch.cat(parts) for layer, parts in watch.tokens.items()})
    assert not any(linear._forward_pre_hooks for _, linear in quantizable_linears(model))
    whole, part, again, other = found
    assert set(whole) == {layer for layer, _ in quantizable_linears(model)}
    with torch.no_grad():
        seen = model.get_submodule(name)(whole[name][: 3 * TINY.num_tokens])
    torch.testing.assert_close(seen.sort(dim=0).values, outputs[0].flatten(0, -2).sort(dim=0).values)
    assert len(part[name]) == 20
    assert torch.equal(part[name], again[name])
    assert not torch.equal(part[name], other[name])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = make_config(tmp_path_factory.mktemp("trained"), {"sensitivity": {"samples": 6, "batch_size": 4}})
    train(config, "teacher", "qat")
    return config


def check_shape(shape: Shape, tokens: int) -> None:
    assert shape.tokens == tokens
    assert all(0 < b < a < 1 for a, b in pairwise(shape.error[bits] for bits in range(1, 8)))


def test_teacher_and_student_are_diagnosed(run: TrainConfig) -> None:
    found = {which: diagnose(Run(run), which) for which in ("teacher", "student")}
    for each in found.values():
        assert sorted(layer.name for layer in each.layers) == [f"blocks.0.{name}" for name in LAYERS]
        for layer in each.layers:
            for shape in (layer.before, layer.after):
                check_shape(shape, 6 if "adaLN" in layer.name else 24)
        assert [(head.block, head.head) for head in each.heads] == [(0, i) for i in range(run.model.num_heads)]
        assert all(0 < head.error < 0.1 and head.logit_sd > 0 for head in each.heads)
    assert diagnose(Run(run)) == found["student"]  # the later one, and the tokens picked are fixed
    assert found["teacher"].layers[0].before != found["student"].layers[0].before
    bits = {layer.name: layer.bits for layer in found["student"].layers}
    assert bits == {layer.name: layer.bits for layer in found["teacher"].layers}


def test_the_report_has_every_figure_and_a_picture_of_each_layer(run: TrainConfig) -> None:
    arguments = ["diagnose", "-c", str(run.run_dir.parent / "run.yaml"), "--model", "teacher"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    folder = run.run_dir / "diagnosis" / "teacher"
    assert str(folder) in result.stdout.replace("\n", "")
    found = json.loads(folder.with_suffix(".json").read_text())
    for layer in found["layers"]:
        bits = str(layer["bits"])
        assert f"{layer['before']['error'][bits]:.4f} -> {layer['after']['error'][bits]:.4f}" in result.stdout
        assert (folder / f"{layer['name']}.png").read_bytes().startswith(b"\x89PNG")
    hurt = sum(after > before for before, after in (layer["output_error"] for layer in found["layers"]))
    assert f"raises the output error of {hurt}" in result.stdout


@pytest.mark.parametrize(
    ("model", "said"), [("student", "states/qat does not exist"), ("packed", "choose teacher or student")]
)
def test_what_is_missing_is_said(tmp_path: Path, model: str, said: str) -> None:
    result = CliRunner().invoke(app, ["diagnose", "-c", str(write_config(tmp_path)), "--model", model])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
