"""Labelled images from a folder, a zip of class folders or an npz, and batches that are a pure function of the step.

Nothing here holds random state: the batch of step ``s`` depends on the seed and ``s`` alone, so a resumed run
sees what the unbroken one would have seen.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor

from robuq_core.errors import UserError
from train.config import DataConfig

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class DataError(UserError):
    """Data that cannot be trained on; the message names the file and the fix."""


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 ``[N, 3, S, S]``, short side resized and centre-cropped to S; ``labels`` int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_dataset(path: Path, size: int, num_classes: int) -> ImageDataset:
    """Read every image of ``path`` at ``size`` pixels.

    A folder or zip holds one sub-folder a class, numbered in sorted order; an npz holds ``arr_0`` (uint8
    ``[N, H, W, 3]``) and ``arr_1`` (labels), or the same as ``images`` and ``labels``.

    Raises:
        DataError: no images, an unreadable one, or classes that do not match ``num_classes``.
    """
    if not path.exists():
        raise DataError(f"data.path {path} does not exist")
    if path.suffix == ".npz":
        arrays, labels = _read_npz(path)
        read: Iterator[tuple[Callable[[], Image.Image], str]] = (
            ((lambda a=a: Image.fromarray(a)), f"{path}[{i}]") for i, a in enumerate(arrays)
        )
    else:
        entries = list(_folder_entries(path) if path.is_dir() else _zip_entries(path))
        if not entries:
            raise DataError(f"data.path {path} holds no class folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        classes = {name: i for i, name in enumerate(sorted({entry[0] for entry in entries}))}
        labels = [classes[entry[0]] for entry in entries]
        read = ((entry[2], entry[1]) for entry in entries)
    found = len(set(labels))
    if min(labels) < 0 or max(labels) >= num_classes or (path.suffix != ".npz" and found != num_classes):
        raise DataError(f"data.path {path} has {found} classes (labels {min(labels)}..{max(labels)}) but "
                        f"model.num_classes is {num_classes}")  # fmt: skip
    images = [_load_square(opener, name, size) for opener, name in track(read, "reading images", total=len(labels))]
    return ImageDataset(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _folder_entries(path: Path) -> Iterator[tuple[str, str, Callable[[], Image.Image]]]:
    for file in sorted(path.glob("*/*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            yield file.parent.name, str(file), (lambda file=file: Image.open(file))


def _zip_entries(path: Path) -> Iterator[tuple[str, str, Callable[[], Image.Image]]]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"data.path {path} is neither a folder, a zip nor an npz") from error
    for name in sorted(archive.namelist()):
        entry = Path(name)
        if entry.suffix.lower() in IMAGE_SUFFIXES and len(entry.parts) > 1:
            yield entry.parts[-2], f"{path}:{name}", (lambda name=name: Image.open(io.BytesIO(archive.read(name))))


def _read_npz(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        archive = np.load(path, allow_pickle=False)
        keys = ("images", "labels") if "images" in archive else ("arr_0", "arr_1")
        images, labels = archive[keys[0]], archive[keys[1]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"data.path {path}: expected arrays arr_0 and arr_1, or images and labels ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(labels):
        raise DataError(f"data.path {path}: expected uint8 [N, H, W, 3] images and N labels, "
                        f"not {images.dtype} {images.shape} and {labels.shape}")  # fmt: skip
    if not len(images):
        raise DataError(f"data.path {path} holds no image")
    return images, [int(label) for label in labels]


def _load_square(opener: Callable[[], Image.Image], name: str, size: int) -> np.ndarray:
    try:
        image = opener().convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{name}: not a readable image ({error}); remove it or replace it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def centre_images(dataset: ImageDataset, size: int) -> Tensor:
    """Centre crops, float32 in [-1, 1], ``[N, 3, size, size]``."""
    margin = (dataset.images.shape[-1] - size) // 2
    return _to_unit(dataset.images[..., margin : margin + size, margin : margin + size])


def _to_unit(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step (and, by ``stream``, of one purpose within it)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


class BatchSource:
    """Augmented batches by step: epochs are permutations, and each batch is drawn from (seed, step) alone."""

    def __init__(self, dataset: ImageDataset, config: DataConfig, crop: int, batch_size: int, seed: int) -> None:
        self.dataset, self.config, self.crop = dataset, config, crop
        self.batch_size, self.seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _sample_index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.dataset), generator=step_generator(self.seed, epoch, stream=1))
        return int(self._order[offset])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, 3, crop, crop]`` in [-1, 1] and labels int64 ``[B]`` of ``step``."""
        size, first = self.batch_size, step * self.batch_size
        generator = step_generator(self.seed, step, stream=2)
        index = torch.tensor([self._sample_index(first + i) for i in range(size)])
        margin = self.dataset.images.shape[-1] - self.crop
        offsets = torch.randint(0, margin + 1, (size, 2), generator=generator).tolist()
        flips = (torch.rand(size, generator=generator) < self.config.flip_probability).tolist()
        crops = []
        for i, (top, left), flip in zip(index.tolist(), offsets, flips, strict=True):
            crop = self.dataset.images[i, :, top : top + self.crop, left : left + self.crop]
            crops.append(crop.flip(-1) if flip else crop)
        return self._jitter(_to_unit(torch.stack(crops)), generator), self.dataset.labels[index]

    def _jitter(self, images: Tensor, generator: torch.Generator) -> Tensor:
        amount = self.config.colour_jitter
        if not amount:
            return images
        factors = 1 + amount * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
        brightness, contrast = factors
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * contrast + mean
        return ((images + 1) * brightness - 1).clamp(-1, 1)
