"""Distances to the photos, pixel by pixel."""

import math

import pytest
import torch
from torch import Tensor

from train.data import ImageDataset, centre_images
from train.evaluation.pixels import pixel_agreement

COUNT, SIDE = 150, 6


def photos(labels: Tensor | None = None, supersample: int = 1, channels: int = 3) -> ImageDataset:
    side = SIDE * supersample + 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (COUNT, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(COUNT) if labels is None else labels, supersample)


@pytest.mark.parametrize("supersample", [1, 2])
def test_an_offset_of_every_pixel_is_its_psnr(supersample: int) -> None:
    dataset = photos(supersample=supersample)
    asked = [140, 3, 77]
    samples = centre_images(dataset, SIDE)[asked] + 0.1
    result = pixel_agreement(samples, asked, dataset)
    assert result.psnr == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)
    assert result.pixel_nearest == 1


def test_the_psnr_is_to_the_asked_class_whatever_is_nearer() -> None:
    dataset = photos()
    crops = centre_images(dataset, SIDE)
    result = pixel_agreement(crops[[5, 100]], [6, 100], dataset)
    assert result.pixel_nearest == 0.5
    far = float((crops[5] - crops[6]).square().mean())
    exact = 10 * math.log10(4 / ((2 / 255) ** 2 / 12))
    assert result.psnr == pytest.approx((10 * math.log10(4 / far) + exact) / 2, abs=1e-6)


def test_the_nearest_of_several_photos_of_the_class_counts() -> None:
    dataset = photos(torch.arange(COUNT) // 50)
    samples = centre_images(dataset, SIDE)[[49, 50]] + 0.1
    result = pixel_agreement(samples, [0, 1], dataset)
    assert result.psnr == pytest.approx(26.0206, abs=1e-3)
    assert result.pixel_nearest == 1


def test_grey_photos_are_compared_with_pictures_of_three_equal_channels() -> None:
    dataset = photos(channels=1)
    samples = (centre_images(dataset, SIDE)[[9]] - 0.1).expand(-1, 3, -1, -1)
    result = pixel_agreement(samples, [9], dataset)
    assert result.psnr == pytest.approx(26.0206, abs=1e-3)
    assert result.pixel_nearest == 1


def test_a_class_without_a_photo_has_no_psnr() -> None:
    dataset = photos()
    samples = centre_images(dataset, SIDE)[[0, 1]]
    assert pixel_agreement(samples, [1000, 1001], dataset).psnr is None
    one_known = pixel_agreement(samples + 0.1, [1000, 1], dataset)
    assert one_known.psnr == pytest.approx(26.0206, abs=1e-3)
    assert one_known.pixel_nearest == 0.5
