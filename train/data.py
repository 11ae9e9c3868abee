"""Labelled images from a folder, a zip of class folders or an npz, and batches that are a pure function of the step.

Nothing here holds random state: the batch of step ``s`` depends on the seed and ``s`` alone, so a resumed run
sees what the unbroken one would have seen.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from robuq_core.errors import UserError
from train.config import DataConfig
from train.messages import one_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

Opener = Callable[[], Image.Image]


class DataError(UserError):
    """Data that cannot be trained on; the message names the file and the fix."""


@dataclass(frozen=True)
class _Entry:
    """An image of a folder or zip: the sub-folder it lies in, its name in messages, and how to open it."""

    class_name: str
    name: str
    open: Opener


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 ``[N, 3, S, S]``, short side resized and centre-cropped to S; ``labels`` int64 ``[N]``.

    Crops are taken at ``supersample`` times the wanted size and averaged down.
    """

    images: Tensor
    labels: Tensor
    supersample: int = 1

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
    is_npz = path.is_file() and path.suffix == ".npz"
    openers: list[tuple[Opener, str]]
    if is_npz:
        arrays, labels = _read_npz(path)
        openers = [(partial(Image.fromarray, array), f"{path}[{i}]") for i, array in enumerate(arrays)]
    else:
        # One order for a folder and its zip: the same seed then draws the same batches from either.
        found_entries = _folder_entries(path) if path.is_dir() else _zip_entries(path)
        entries = sorted(found_entries, key=lambda entry: (entry.class_name, entry.name))
        if not entries:
            raise DataError(f"data.path {path} holds no class folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        classes = {name: i for i, name in enumerate(sorted({entry.class_name for entry in entries}))}
        labels = [classes[entry.class_name] for entry in entries]
        openers = [(entry.open, entry.name) for entry in entries]
    found = len(set(labels))
    if min(labels) < 0 or max(labels) >= num_classes or (not is_npz and found != num_classes):
        raise DataError(f"data.path {path} has {found} classes (labels {min(labels)}..{max(labels)}) but "
                        f"model.num_classes is {num_classes}")  # fmt: skip
    images = [_load_square(opener, name, size) for opener, name in track(openers, "reading images")]
    return ImageDataset(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _is_image(path: Path) -> bool:
    """``CLASS/NAME`` by its suffix; hidden ones are left out (macOS zips have a ``._photo.jpg`` beside every photo)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts[-2:])


def _folder_entries(path: Path) -> Iterator[_Entry]:
    for file in path.glob("*/*"):
        if _is_image(file):
            yield _Entry(file.parent.name, str(file), partial(Image.open, file))


def _zip_entries(path: Path) -> Iterator[_Entry]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"data.path {path} is neither a folder, a zip nor an npz") from error
    for name in archive.namelist():
        member = Path(name)
        if _is_image(member) and len(member.parts) > 1:
            yield _Entry(member.parts[-2], f"{path}:{name}", partial(_open_member, archive, name))


def _open_member(archive: zipfile.ZipFile, name: str) -> Image.Image:
    return Image.open(io.BytesIO(archive.read(name)))


def _read_npz(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = ("images", "labels") if "images" in archive else ("arr_0", "arr_1")
            images, labels = archive[keys[0]], archive[keys[1]]
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"data.path {path}: expected arrays arr_0 and arr_1, or images and labels "
                        f"({one_line(error)})") from error  # fmt: skip
    images_fit = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    labels_fit = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not (images_fit and labels_fit):
        raise DataError(f"data.path {path}: expected uint8 [N, H, W, 3] images and N whole labels, "
                        f"not {images.dtype} {images.shape} and {labels.dtype} {labels.shape}")  # fmt: skip
    if not images.size:
        raise DataError(f"data.path {path} holds no image")
    return images, [int(label) for label in labels]


def _load_square(opener: Opener, name: str, size: int) -> np.ndarray:
    try:
        image = opener().convert("RGB")
    except Exception as error:  # a damaged file leads decoders to raise almost anything
        raise DataError(f"{name}: not a readable image ({one_line(error)}); remove it or replace it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def centre_images(dataset: ImageDataset, size: int) -> Tensor:
    """Centre crops, float32 in [-1, 1], ``[N, 3, size, size]``."""
    side = size * dataset.supersample
    margin = (dataset.images.shape[-1] - side) // 2
    crops = dataset.images[..., margin : margin + side, margin : margin + side]
    return _shrink(_to_unit(crops), dataset.supersample)


def _shrink(images: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(images, factor) if factor > 1 else images


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
        side = self.crop * self.dataset.supersample
        margin = self.dataset.images.shape[-1] - side
        offsets = torch.randint(0, margin + 1, (size, 2), generator=generator).tolist()
        flips = (torch.rand(size, generator=generator) < self.config.flip_probability).tolist()
        crops = []
        for i, (top, left), flip in zip(index.tolist(), offsets, flips, strict=True):
            crop = self.dataset.images[i, :, top : top + side, left : left + side]
            crops.append(crop.flip(-1) if flip else crop)
        images = _shrink(_to_unit(torch.stack(crops)), self.dataset.supersample)
        return self._jitter(images, generator), self.dataset.labels[index]

    def _jitter(self, images: Tensor, generator: torch.Generator) -> Tensor:
        amount = self.config.colour_jitter
        if not amount:
            return images
        factors = 1 + amount * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
        brightness, contrast = factors
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * contrast + mean
        jittered: Tensor = (images + 1) * brightness - 1
        return jittered.clamp(-1, 1)
