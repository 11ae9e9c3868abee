"""The study's images in memory: grey, one byte a pixel, training and test split."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.config import ConfigError
from train.data.idx import read_idx


@dataclass(frozen=True)
class GreyImages:
    """``train``, ``test``: uint8 ``[N, 1, S, S]``; their ``*_labels`` int64 ``[N]``; ``checksum`` of all four."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    checksum: str

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1


def load_grey_images(folder: Path) -> GreyImages:
    """Read the IDX files of ``folder``, the layout of MNIST and Fashion-MNIST.

    Raises:
        DataError: as :func:`train.data.idx.read_idx`.
    """
    tensors: list[Tensor] = []
    checksum = 0
    for split in ("train", "test"):
        images, labels = read_idx(folder, split)
        for array in (images, labels):
            checksum = zlib.crc32(array.tobytes(), checksum)
        tensors += [torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.copy()).long()]
    train, train_labels, test, test_labels = tensors
    return GreyImages(train, train_labels, test, test_labels, f"crc32:{checksum:08x}")


def check_fits(data: GreyImages, size: int, num_classes: int) -> None:
    """Raises:
    ConfigError: images or classes are not those of the model.
    """
    if data.train.shape[-1] != size or data.train.shape[-2] != size:
        raise ConfigError(f"model.input_size is {size}, but the images have {'x'.join(map(str, data.train.shape[2:]))}")
    if data.num_classes != num_classes:
        raise ConfigError(f"model.num_classes is {num_classes}, but the data has {data.num_classes}")


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
