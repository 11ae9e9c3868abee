"""Figures of merit: the photos agree with themselves, and the contact sheet is laid out as it says."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import CLASSES, make_config, write_config
from tiny import write_tiny
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from train import evaluate
from train.cli import app
from train.evaluate import (
    EvaluationError,
    FeatureNetwork,
    agreement,
    contact_sheet,
    draw,
    plain_sampler,
    random_classes,
)
from train.stages import load_teacher, train_teacher


class PixelNetwork:
    """Stands in for the feature network: the pixels are the features, and the logits."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.flatten(1)
        return F.normalize(flat, dim=1), flat[:, :1000]


def photos(count: int = 12, side: int = 20) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def as_network() -> Any:
    return PixelNetwork()


def test_photos_agree_with_themselves() -> None:
    images, labels = photos(), torch.arange(12)
    chosen = [7, 2, 11]
    result = agreement(images[chosen], chosen, images, labels, as_network())
    assert result.samples == 3
    assert result.nearest == 1
    assert (result.top1, result.top5) == (result.photos_top1, result.photos_top5)


@given(wrong=st.integers(0, 12))
def test_the_nearest_share_counts_the_samples_of_the_asked_class(wrong: int) -> None:
    images, labels = photos(), torch.arange(12)
    asked = [(i + 1) % 12 if i < wrong else i for i in range(12)]
    assert agreement(images, asked, images, labels, as_network()).nearest == pytest.approx((12 - wrong) / 12)


def test_any_photo_of_the_class_counts_as_nearest() -> None:
    images, labels = photos(), torch.arange(12) // 3
    result = agreement(images[[1, 5]], [0, 1], images, labels, as_network())
    assert result.nearest == 1


def test_the_classifier_counts_its_first_and_first_five() -> None:
    logits = torch.arange(10.0).expand(3, 10)
    assert evaluate._topk(logits, torch.tensor([9, 5, 4])) == pytest.approx((1 / 3, 2 / 3))


@given(count=st.integers(1, 1000), num_classes=st.integers(1, 1000), seed=st.integers(0, 2**32 - 1))
def test_random_classes_are_distinct_and_of_their_seed(count: int, num_classes: int, seed: int) -> None:
    drawn = random_classes(count, num_classes, seed)
    assert drawn == random_classes(count, num_classes, seed)
    assert len(set(drawn)) == len(drawn) == min(count, num_classes)
    assert all(0 <= each < num_classes for each in drawn)


def test_another_seed_draws_other_classes() -> None:
    assert random_classes(20, 1000, 0) != random_classes(20, 1000, 1)


@given(count=st.integers(1, 9), columns=st.integers(1, 5), gap=st.integers(0, 3))
def test_the_contact_sheet_is_a_grid_in_reading_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, columns: int, gap: int
) -> None:
    side, path = 4, tmp_path_factory.mktemp("sheet") / "new" / "sheet.png"
    levels = torch.arange(count) * 20 + 10
    images = (levels / 127.5 - 1)[:, None, None, None].expand(count, 3, side, side)
    contact_sheet(images, columns, path, gap)
    sheet = np.asarray(Image.open(path))
    rows = -(-count // columns)
    assert sheet.shape == (rows * (side + gap) + gap, columns * (side + gap) + gap, 3)
    covered = np.zeros(sheet.shape[:2], dtype=bool)
    for i in range(count):
        top, left = (gap + each * (side + gap) for each in divmod(i, columns))
        assert (sheet[top : top + side, left : left + side] == int(levels[i])).all()
        covered[top : top + side, left : left + side] = True
    assert (sheet[~covered] == 255).all()


def test_samples_of_the_teacher_depend_on_their_seed_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train_teacher(config)
    sampler = plain_sampler(load_teacher(config), config, "teacher")
    samples = draw(sampler, [0, 1, 2, 3], seed=4)
    assert samples.shape == (4, 3, 8, 8)
    assert samples.min() >= -1
    assert samples.max() <= 1
    # Not bit for bit: the plain network's matrix products round by the size of the batch.
    assert float((draw(sampler, [2], seed=6)[0] - samples[2]).abs().max()) <= 2 / 127.5
    assert not torch.equal(draw(sampler, [2], seed=7)[0], samples[2])


def test_evaluate_prints_its_figures_and_writes_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    train_teacher(config)
    monkeypatch.setattr(evaluate, "FeatureNetwork", PixelNetwork)
    sheet = tmp_path / "sheets" / "teacher.png"
    result = CliRunner().invoke(
        app, ["evaluate", "-c", str(tmp_path / "run.yaml"), "--sheet", str(sheet), "--seed", "1"]
    )
    assert result.exit_code == 0, result.output
    assert f'"samples": {CLASSES}' in result.stdout
    assert '"model": "teacher"' in result.stdout
    assert Image.open(sheet).size == (8 * (96 + 2) + 2, 96 + 4)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.safetensors")
    path = write_config(tmp_path)
    result = CliRunner().invoke(app, ["evaluate", "-c", str(path), "--checkpoint", str(tmp_path / "tiny.safetensors")])
    assert result.exit_code == 2
    assert "tiny draws 16 px and 10 classes, but the configuration has 8 px and 4" in result.stderr


def test_a_missing_feature_network_is_said_before_any_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return find(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvaluationError, match=r"pip install 'robuq\[train\]'"):
        FeatureNetwork()


@pytest.mark.slow
def test_the_feature_network_tells_photos_apart() -> None:
    images, labels = photos(6, 32), torch.arange(6)
    network = FeatureNetwork()
    features, logits = network(images)
    assert features.shape == (6, 1280)
    assert logits.shape == (6, 1000)
    assert torch.allclose(features.norm(dim=1), torch.ones(6), atol=1e-5)
    assert agreement(images, list(range(6)), images, labels, network).nearest == 1
