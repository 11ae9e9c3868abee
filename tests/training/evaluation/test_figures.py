"""Agreement with the asked class, nearness of pixels, and means over seeds."""

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import PixelNetwork
from torch import Tensor

from train.data import ImageDataset, to_unit
from train.evaluation.figures import Gallery, agreement, best_five, estimate, pixel_agreement, shares_right
from train.evaluation.networks import EfficientNetLite0, EvaluationError, Features


def photos(count: int = 12, side: int = 20) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gallery_of(features: Features, labels: Tensor) -> Gallery:
    return Gallery(features.pool, labels, best_five(features.logits))


def compare(chosen: list[int], asked: list[int], labels: Tensor, classifier: bool = True) -> dict[str, Any]:
    """Photos ``chosen``, taken for samples of the classes ``asked``, beside all photos."""
    network = PixelNetwork(side=20)
    images = photos(len(labels))
    return agreement(network(images[chosen]), asked, gallery_of(network(images), labels), classifier=classifier)


def test_photos_agree_with_themselves() -> None:
    result = compare([7, 2, 11], [7, 2, 11], torch.arange(12))
    assert result["samples"] == 3
    assert result["nearest"] == 1
    assert (result["top1"], result["top5"]) == (result["photos_top1"], result["photos_top5"])


@given(wrong=st.integers(0, 12))
def test_the_nearest_share_counts_the_samples_of_the_asked_class(wrong: int) -> None:
    asked = [(i + 1) % 12 if i < wrong else i for i in range(12)]
    assert compare(list(range(12)), asked, torch.arange(12))["nearest"] == pytest.approx((12 - wrong) / 12)


def test_classes_of_another_data_set_get_no_verdict() -> None:
    result = compare([1], [1], torch.arange(12), classifier=False)
    assert result["nearest"] == 1
    assert (result["top1"], result["top5"], result["photos_top1"], result["photos_top5"]) == (None,) * 4


def test_the_classifier_counts_its_first_and_first_five() -> None:
    verdicts = torch.tensor([[9, 8, 7, 6, 5]] * 3)
    assert shares_right(verdicts, torch.tensor([9, 5, 4])) == pytest.approx((1 / 3, 2 / 3))


def test_a_missing_feature_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("efficientnet"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvaluationError, match=r"pip install '\.\[train\]'"):
        EfficientNetLite0()


@pytest.mark.slow
def test_the_feature_network_tells_photos_apart() -> None:
    images, labels = photos(6, 32), torch.arange(6)
    network = EfficientNetLite0()
    features = network(images)
    assert features.pool.shape == (6, 1280)
    assert features.logits.shape == (6, 1000)
    assert agreement(features, list(range(6)), gallery_of(features, labels))["nearest"] == 1


COUNT, SIDE = 150, 6


def pixel_photos(labels: Tensor | None = None, channels: int = 3) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (COUNT, channels, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(COUNT) if labels is None else labels)


def test_an_offset_of_every_pixel_is_its_psnr() -> None:
    dataset = pixel_photos()
    asked = [140, 3, 77]
    samples = to_unit(dataset.images)[asked] + 0.1
    result = pixel_agreement(samples, asked, dataset)
    assert result["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)
    assert result["pixel_nearest"] == 1


def test_the_psnr_is_to_the_asked_class_whatever_is_nearer() -> None:
    dataset = pixel_photos()
    crops = to_unit(dataset.images)
    result = pixel_agreement(crops[[5, 100]], [6, 100], dataset)
    assert result["pixel_nearest"] == 0.5
    far = float((crops[5] - crops[6]).square().mean())
    exact = 10 * math.log10(4 / ((2 / 255) ** 2 / 12))
    assert result["psnr"] == pytest.approx((10 * math.log10(4 / far) + exact) / 2, abs=1e-6)


def test_the_nearest_of_several_photos_of_the_class_counts() -> None:
    dataset = pixel_photos(torch.arange(COUNT) // 50)
    samples = to_unit(dataset.images)[[49, 50]] + 0.1
    result = pixel_agreement(samples, [0, 1], dataset)
    assert result["psnr"] == pytest.approx(26.0206, abs=1e-3)
    assert result["pixel_nearest"] == 1


def test_grey_photos_are_compared_with_pictures_of_three_equal_channels() -> None:
    dataset = pixel_photos(channels=1)
    samples = (to_unit(dataset.images)[[9]] - 0.1).expand(-1, 3, -1, -1)
    result = pixel_agreement(samples, [9], dataset)
    assert result["psnr"] == pytest.approx(26.0206, abs=1e-3)
    assert result["pixel_nearest"] == 1


def test_a_class_without_a_photo_has_no_psnr() -> None:
    dataset = pixel_photos()
    samples = to_unit(dataset.images)[[0, 1]]
    assert pixel_agreement(samples, [1000, 1001], dataset)["psnr"] is None
    one_known = pixel_agreement(samples + 0.1, [1000, 1], dataset)
    assert one_known["psnr"] == pytest.approx(26.0206, abs=1e-3)
    assert one_known["pixel_nearest"] == 0.5


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3, 2, (4000, 3))
    intervals = [estimate(row)["interval"] for row in draws.tolist()]
    assert np.mean([low <= 3 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.012)
    assert estimate([2.0]) == {"mean": 2.0, "interval": None, "by_seed": [2.0]}
