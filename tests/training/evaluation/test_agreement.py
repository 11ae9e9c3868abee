"""The photos agree with themselves, and shares count what they say."""

import builtins
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import PixelNetwork
from torch import Tensor

from train.evaluation.agreement import Agreement, agreement, gallery_of, shares_right
from train.evaluation.errors import EvaluationError
from train.evaluation.networks import EfficientNetLite0


def photos(count: int = 12, side: int = 20) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def compare(chosen: list[int], asked: list[int], labels: Tensor, classifier: bool = True) -> Agreement:
    """Photos ``chosen``, taken for samples of the classes ``asked``, beside all photos."""
    network = PixelNetwork(side=20)
    images = photos(len(labels))
    return agreement(network(images[chosen]), asked, gallery_of(network(images), labels), classifier=classifier)


def test_photos_agree_with_themselves() -> None:
    result = compare([7, 2, 11], [7, 2, 11], torch.arange(12))
    assert result.samples == 3
    assert result.nearest == 1
    assert (result.top1, result.top5) == (result.photos_top1, result.photos_top5)


@given(wrong=st.integers(0, 12))
def test_the_nearest_share_counts_the_samples_of_the_asked_class(wrong: int) -> None:
    asked = [(i + 1) % 12 if i < wrong else i for i in range(12)]
    assert compare(list(range(12)), asked, torch.arange(12)).nearest == pytest.approx((12 - wrong) / 12)


def test_any_photo_of_the_class_counts_as_nearest() -> None:
    assert compare([1, 5], [0, 1], torch.arange(12) // 3).nearest == 1


def test_a_brighter_copy_is_as_near() -> None:
    network, images = PixelNetwork(side=20), photos()
    gallery = gallery_of(network(images), torch.arange(12))
    assert agreement(network(images * 0.5), list(range(12)), gallery).nearest == 1  # a cosine knows no length


def test_classes_of_another_data_set_get_no_verdict() -> None:
    result = compare([1], [1], torch.arange(12), classifier=False)
    assert result.nearest == 1
    assert (result.top1, result.top5, result.photos_top1, result.photos_top5) == (None,) * 4


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
    assert agreement(features, list(range(6)), gallery_of(features, labels)).nearest == 1
