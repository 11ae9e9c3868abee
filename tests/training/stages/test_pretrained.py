"""A run begins with weights of elsewhere only if they are what the configuration says, and gives its own away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_run import make_config, merged, state_of, train
from typer.testing import CliRunner

from robuq_core.checkpoint import read_header
from robuq_core.cli import app
from robuq_core.config import DiffusionConfig
from robuq_core.errors import UserError
from robuq_core.models.adapters import read_weights, save_diffusers
from train.config import ConfigError, TrainConfig
from train.run import Run

DIFFUSERS = {"model": {"flavour": "diffusers"}}


@pytest.fixture
def folder(trained: TrainConfig, tmp_path: Path) -> Path:
    save_diffusers(Run(trained).teacher(), tmp_path / "DiT", diffusion=trained.diffusion)
    return tmp_path / "DiT"


def taking(root: Path, weights: Path, changes: dict[str, Any]) -> TrainConfig:
    return make_config(root, merged(changes, {"teacher": {"pretrained": str(weights)}}))


def test_a_diffusers_folder_is_trained_on_and_packed(trained: TrainConfig, folder: Path, tmp_path: Path) -> None:
    config = taking(tmp_path, folder, DIFFUSERS)
    for stage in ("teacher", "qat", "export"):
        train(config, stage)
    taken, ours = Run(config).teacher(), Run(trained).teacher()
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in taken.named_parameters())
    header = read_header(config.run_dir / "model.safetensors")
    assert (header.model.flavour, header.diffusion) == ("diffusers", trained.diffusion)
    assert header.provenance["teacher"]["history"][0]["pretrained"] == "DiT"


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (DiffusionConfig(prediction_type="v_prediction", clip_sample=True),
         r"DiT: diffusion\.prediction_type is v_prediction there, not sample; write into the configuration"),
        (DiffusionConfig(prediction_type="sample"), r"DiT: diffusion\.clip_sample is False there, not True"),
    ],
)  # fmt: skip
def test_weights_of_another_process_are_named(
    trained: TrainConfig, tmp_path: Path, theirs: DiffusionConfig, message: str
) -> None:
    save_diffusers(Run(trained).teacher(), tmp_path / "DiT", diffusion=theirs)
    config = taking(tmp_path, tmp_path / "DiT", DIFFUSERS)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Run(config).path("teacher").exists()
    # The transformer alone does not say what it was trained on.
    train(taking(tmp_path, tmp_path / "DiT" / "transformer", DIFFUSERS))


def test_a_folders_heads_are_compared_like_the_rest_of_its_shape(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_heads is 2 there, not 3; model\.flavour is diffusers there"):
        train(taking(tmp_path, folder, {"model": {"num_heads": 3}}))


def test_the_teacher_of_another_run_is_of_its_process(trained: TrainConfig, tmp_path: Path) -> None:
    weights = Run(trained).path("teacher")
    train(config := taking(tmp_path, weights, {}))
    assert state_of(config).history[0]["pretrained"] == "teacher"
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"prediction.* sample .*epsilon"):
        train(taking(tmp_path / "other", weights, {"diffusion": {"prediction_type": "epsilon"}}))


@pytest.mark.parametrize("target", ["teacher-official.pt", "folder", "packed.safetensors"])
def test_a_trained_teacher_is_converted(trained: TrainConfig, tmp_path: Path, target: str) -> None:
    packed = target.endswith(".safetensors")
    arguments = [
        "convert",
        str(Run(trained).path("teacher")),
        str(tmp_path / target),
        *(["--ptq", "--rank", "2"] * packed),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if packed:
        header = read_header(tmp_path / target)
        assert (header.model, header.diffusion) == (trained.model, trained.diffusion)
        return
    weights, ours = read_weights(tmp_path / target, num_heads=trained.model.num_heads), Run(trained).teacher()
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in weights.model().named_parameters())
    assert weights.diffusion is not None
    assert weights.diffusion.prediction_type == trained.diffusion.prediction_type
    if target == "folder":  # the official form says no more than that
        assert weights.diffusion == trained.diffusion
