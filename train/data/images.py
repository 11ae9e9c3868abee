"""Images at the size that a model wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from train.data.errors import DataError
from train.data.pictures import eight_bit
from train.data.shards import ShardedTensor
from train.data.sources import Source, Split, open_source
from train.messages import one_line
from train.progress import tracked

Fit = Literal["resize", "pad", "adm"]


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 ``[N, C, S, S]``, RGB or grey, short side resized and centre-cropped to S; ``labels`` int64
    ``[N]``.

    Crops are taken at ``supersample`` times the wanted size and averaged down.
    """

    images: Tensor | ShardedTensor
    labels: Tensor
    supersample: int = 1

    def __len__(self) -> int:
        return len(self.labels)


def load_dataset(path: Path, size: int, num_classes: int, split: Split = "train", fit: Fit = "resize") -> ImageDataset:
    """Read every image of ``path`` (see :func:`train.data.sources.open_source`) at ``size`` pixels into memory.

    Raises:
        DataError: no images, an unreadable one, or classes that do not match ``num_classes``.
    """
    source = open_source(path, num_classes, split)
    with tracked(range(len(source)), "reading images") as indices:
        images = [read_square(source, i, size, fit) for i in indices]
    return ImageDataset(torch.from_numpy(np.stack(images)), torch.from_numpy(source.labels))


def read_square(
    source: Source,
    index: int,
    size: int,
    fit: Fit = "resize",
    channels: int = 3,
    transparent: list[int] | None = None,
) -> np.ndarray:
    """Image ``index`` as uint8 ``[channels, size, size]``; three ``channels`` are RGB, one is grey.

    ``fit``: ``resize`` takes the middle square and resizes it (Lanczos); ``pad`` centres a smaller image on black;
    ``adm`` halves the image by box filters while its short side is at least twice ``size``, resizes the short side to
    ``size`` (bicubic) and crops, as published ImageNet figures do (ADM, arXiv 2105.05233).
    ``transparent``: gets ``index`` if the image has transparency (see :func:`train.data.pictures.eight_bit`).

    Raises:
        DataError: it is unreadable.
    """
    try:
        image = source.open(index)
        if transparent is not None and image.has_transparency_data:
            transparent.append(index)
        image = eight_bit(image, channels)
    except Exception as error:  # a damaged file leads decoders to raise almost anything
        raise DataError(
            f"{source.name(index)}: not a readable image ({one_line(error)}); remove it or replace it"
        ) from error
    if fit == "pad" and max(image.size) <= size:
        square = Image.new(image.mode, (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    elif fit == "adm":
        square = _adm_crop(image, size)
    else:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).reshape(size, size, channels).transpose(2, 0, 1))


def _adm_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def centre_images(dataset: ImageDataset, size: int, rows: slice = slice(None)) -> Tensor:
    """Centre crops, float32 in [-1, 1], ``[N, C, size, size]`` of ``rows``; mind the memory that all of them need."""
    side = size * dataset.supersample
    margin = (dataset.images.shape[-1] - side) // 2
    crops = dataset.images[rows][..., margin : margin + side, margin : margin + side]
    return shrink(to_unit(crops), dataset.supersample)


def shrink(images: Tensor, factor: int) -> Tensor:
    """Means of ``factor x factor`` pixels."""
    return F.avg_pool2d(images, factor) if factor > 1 else images


def to_unit(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
