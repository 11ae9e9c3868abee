"""How near samples come to the training photos, pixel by pixel: memory, measured without any network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from train.data import ImageDataset, centre_images

_BATCH = 64
# Of values in [-1, 1]. Pixels are bytes, so that no smaller error than that of rounding to them can be told.
_PEAK_SQUARED, _ROUNDING = 4.0, (2 / 255) ** 2 / 12


@dataclass(frozen=True)
class PixelAgreement:
    """``psnr``: of a sample to the nearest photo of the asked class, in dB, averaged over samples; none if no class has
    a photo. ``pixel_nearest``: share of 0..1 of samples whose nearest photo is of the asked class."""

    psnr: float | None
    pixel_nearest: float

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def pixel_agreement(samples: Tensor, classes: Sequence[int], photos: ImageDataset) -> PixelAgreement:
    """Compare ``samples [N, 3, S, S]`` in [-1, 1], of ``classes``, with the centre crops of ``photos``.

    Nearest is by mean squared error, and ``PSNR = 10 log10(4 / MSE)``; at most 58.9 dB, where the MSE is that of
    rounding to bytes.
    """
    flat, wanted = samples.flatten(1).double(), torch.tensor(classes)
    nearest = torch.full((len(flat),), torch.inf, dtype=torch.float64)
    nearest_of_class, label = nearest.clone(), torch.full((len(flat),), -1)
    for first in range(0, len(photos), _BATCH):
        rows = slice(first, first + _BATCH)
        crops = centre_images(photos, samples.shape[-1], rows).expand(-1, samples.shape[1], -1, -1)
        errors = _mean_squared_errors(flat, crops.flatten(1).double())
        least, at = errors.min(dim=1)
        label = torch.where(least < nearest, photos.labels[rows][at], label)
        nearest = torch.minimum(nearest, least)
        others = photos.labels[rows] != wanted[:, None]
        nearest_of_class = torch.minimum(nearest_of_class, errors.masked_fill(others, torch.inf).amin(dim=1))
    known = nearest_of_class[nearest_of_class.isfinite()].clamp(min=_ROUNDING)
    psnr = float((10 * (_PEAK_SQUARED / known).log10()).mean()) if len(known) else None
    return PixelAgreement(psnr, float((label == wanted).float().mean()))


def _mean_squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """``[N, M]`` of ``a [N, D]`` and ``b [M, D]``; float64, in which the difference of the sums keeps its digits."""
    sums = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return sums / a.shape[1]
