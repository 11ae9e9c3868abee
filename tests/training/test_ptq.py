"""Calibrated packing comes nearer to the teacher than rounding alone, from its own samples, the same for one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from robuq_core.checkpoint import read_checkpoint, read_header
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.convert import pack_untrained, untrained_quant
from robuq_core.kernels.ops import fused_linear
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.adapters import load_dit, save_official
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.pipeline import Sampler
from robuq_core.quant.hadamard import random_signs
from train.cli import app
from train.ptq import Calibration, GridLinear, Moments, descend, fit, own_points, pack_calibrated

SHAPE = ModelConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=48, depth=2, num_heads=2, num_classes=6, learn_sigma=False
)
ONE_PLANE = {"weight_planes": 1, "rank": 4}
FAST = Calibration(steps=0, inputs=128)


def save_teacher(path: Path, prediction: str = "v_prediction", **changes: Any) -> Path:
    torch.manual_seed(0)
    model = DiT(SHAPE.model_copy(update=changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.3 if "embedding_table" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    save_official(model, path, DiffusionConfig(prediction_type=prediction))  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt")


def pack(source: Path, target: Path, settings: Calibration = FAST, **options: Any) -> Path:
    pack_calibrated(source, target, settings, ONE_PLANE, {"guidance_scale": 1.0}, num_heads=2, **options)
    return target


@torch.no_grad()
def error(packed: Path, source: Path) -> float:
    """Off the teacher, relative, on trajectories that nothing was calibrated on."""
    _, original = load_dit(source, num_heads=2)
    defaults = SamplerConfig(guidance_scale=1.0)
    points = own_points(original, DiffusionConfig(prediction_type="v_prediction"), defaults, 64, 77)
    file = read_checkpoint(packed)
    network = PackedDiT(file.header.model, file.dense, file.layers, ReferenceBackend())
    wanted, (x, timesteps, classes) = original(*points), points
    return float((network.forward(x, timesteps.tolist(), classes.tolist()) - wanted).norm() / wanted.norm())


@pytest.mark.slow
def test_each_stage_comes_nearer_to_the_teacher(teacher: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    pack_untrained(teacher, plain, untrained_quant(**ONE_PLANE), num_heads=2)
    fitted = pack(teacher, tmp_path / "fitted.safetensors", Calibration(steps=0, inputs=256))
    tuned = pack(teacher, tmp_path / "tuned.safetensors", Calibration(steps=50, inputs=256))
    before, after_fit, after_steps = (error(path, teacher) for path in (plain, fitted, tuned))
    assert after_fit < 0.7 * before
    assert after_steps < 0.95 * after_fit
    # What the file says of itself was measured on other held-out samples.
    said = read_header(tuned).provenance["relative_error_on_own_samples"]
    assert said == pytest.approx(after_steps, rel=0.3)


def test_the_seed_decides(teacher: Path, tmp_path: Path) -> None:
    first, again, other = (
        pack(teacher, tmp_path / f"{i}.safetensors", Calibration(steps=2, inputs=32, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert first.read_bytes() == again.read_bytes()
    assert read_header(first).tensors != read_header(other).tensors


@pytest.mark.parametrize(
    ("prediction", "changes"),
    [
        ("flow", {"flavour": "sit", "learn_sigma": True}),
        ("flow", {"flavour": "repa"}),
        ("epsilon", {"num_classes": 0}),
        ("epsilon", {"null_class": False, "in_channels": 4}),
    ],
    ids=["sit", "repa", "unconditional", "latents without a null class"],
)
def test_every_kind_is_calibrated_and_drawn_with(tmp_path: Path, prediction: str, changes: dict[str, Any]) -> None:
    source = save_teacher(tmp_path / "teacher.pt", prediction, **changes)
    target = tmp_path / "packed.safetensors"
    header = pack_calibrated(
        source,
        target,
        Calibration(steps=1, inputs=16),
        {"rank": 4},
        {},
        num_heads=2,
        decoder="pixels" if changes.get("in_channels", 3) == 3 else None,
    )
    assert header.diffusion.prediction_type == prediction
    assert 0 < header.provenance["relative_error_on_own_samples"] < 0.5
    assert header.provenance["calibration"] == {"steps": 1, "inputs": 16, "seed": 0}
    if header.decoder == "pixels":
        sampler = Sampler.from_checkpoint(target, backend="reference")
        assert sampler.generate([None if header.model.num_classes == 0 else 1], seed=0, steps=2)


def grid_linear(planes: int = 1, rank: int = 3) -> tuple[nn.Linear, GridLinear]:
    torch.manual_seed(1)
    linear = nn.Linear(48, 20)
    layer = QuantLinear(linear, bits=8, grid="midrise", weight_scale="conditional_mean", rank=rank,
                        signs=random_signs(48, torch.Generator().manual_seed(2)), weight_planes=planes)  # fmt: skip
    return linear, GridLinear.of(layer)


def inputs() -> Tensor:
    """Of few directions, as those of a network are."""
    torch.manual_seed(3)
    return torch.randn(400, 48) @ (torch.randn(48, 48) * torch.logspace(0, -2, 48)) + 0.5


@pytest.mark.parametrize("planes", [1, 2, 3])
@torch.no_grad()
def test_a_fitted_layer_is_nearer_than_a_rounded_one(planes: int) -> None:
    linear, layer = grid_linear(planes)
    x = inputs()

    def off() -> float:
        return float((layer(x[300:]) - linear(x[300:])).norm() / linear(x[300:]).norm())

    before = off()
    moments = Moments(48)
    moments.add(*layer.inputs_of(x[:300], x[:300]))
    fit(layer, linear, moments)
    assert off() < 0.9 * before


@torch.no_grad()
def test_a_fit_mends_what_the_layers_before_did() -> None:
    linear, layer = grid_linear(planes=3)
    theirs = inputs()
    ours = theirs * 0.6 + 0.1  # such as a student's would be
    moments = Moments(48)
    moments.add(*layer.inputs_of(theirs, ours))
    fit(layer, linear, moments)
    assert (layer(ours) - linear(theirs)).norm() < 0.5 * (linear(ours) - linear(theirs)).norm()


@pytest.mark.parametrize("planes", [1, 3])
@torch.no_grad()
def test_what_is_packed_is_what_was_fitted(planes: int) -> None:
    _, layer = grid_linear(planes)
    layer.step.mul_(1.1)
    x, backend = inputs()[:9], ReferenceBackend()
    packed = pack_layer(layer)
    torch.testing.assert_close(layer(x), fused_linear(backend)(x, packed), rtol=1e-4, atol=1e-4)


def test_no_sweep_comes_further_from_the_target() -> None:
    torch.manual_seed(4)
    target, step = torch.randn(7, 150), torch.full((7,), 0.9)
    root = torch.randn(150, 150) / 12
    metric = root @ root.T + 0.1 * torch.eye(150)
    levels = (target / step[:, None]).round().clamp(-1, 1)

    def objective() -> Tensor:
        rest = target - step[:, None] * levels
        return ((rest @ metric) * rest).sum(1)

    before = objective()
    for sweep in range(4):
        descend(levels, step, target, metric, top=1)
        after = objective()
        assert bool((after <= before * (1 + 1e-5)).all())
        assert sweep > 0 or bool((after < 0.9 * before).all())
        before = after
    assert set(levels.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_the_command_packs_and_names_what_is_wrong(teacher: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed.safetensors"
    arguments = ["ptq", str(teacher), str(target), "--heads", "2", "--steps", "0", "--inputs", "16", "--rank", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert str(target) in result.output
    assert read_header(target).quant == QuantConfig(activation_bits=8, adaln_bits=8, weight_planes=3, rank=4)
    for source, wrong, named in (
        (tmp_path / "none.pt", target, "none.pt"),
        (target, tmp_path / "again.safetensors", "packed.safetensors"),
        (teacher, tmp_path / "packed.pt", "packed.pt"),
    ):
        refused = CliRunner().invoke(app, ["ptq", str(source), str(wrong), "--heads", "2"])
        assert refused.exit_code == 2
        assert named in refused.output
        assert not (tmp_path / "again.safetensors").exists()
