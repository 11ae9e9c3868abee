"""Labelled images as they come: class folders, a zip of them, npz, Parquet or IDX, opened one image at a time.

Nothing here knows the size that a model wants; :mod:`train.data.images` does.
"""

from __future__ import annotations

import math
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from train.data.errors import DataError
from train.data.idx import holds_idx, read_idx
from train.data.parquet import ParquetImages, parquet_files
from train.data.pictures import DEFLATE_RATIO, IMAGE_SUFFIXES, open_image
from train.messages import one_line

Split = Literal["train", "val", "test"]
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

# No photo is larger; a member of a zip says how large it is before it is unpacked.
MAX_IMAGE_BYTES = 2**28


@dataclass(frozen=True)
class Source:
    """A data set before it is read: ``labels`` int64 ``[N]``, and image ``i`` by ``open(i)``, called ``name(i)``.

    Images are opened cheapest in rising order.
    """

    labels: np.ndarray
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Entry:
    """An image of a folder or zip: the folder it lies in, its name in messages, and how to open it.

    ``split``: the folder above its class that is named like a split, if there is one.
    """

    folder: Path
    name: str
    open: Callable[[], Image.Image]
    split: Split | None

    @property
    def class_name(self) -> str:
        """In NFC, so that macOS's decomposed names sort and compare as others do."""
        return unicodedata.normalize("NFC", self.folder.name)


def open_source(path: Path, num_classes: int, split: Split = "train") -> Source:
    """The images of ``path``, none read yet.

    A folder or zip holds one sub-folder per class, numbered in sorted order, or such sub-folders in ``train``, ``val``
    and ``test``, of which ``split`` is read; an npz holds ``arr_0`` (uint8
    ``[N, H, W, 3]``) and ``arr_1`` (labels), or the same as ``images`` and ``labels``; a folder with IDX files holds
    ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` (``t10k-`` for ``split`` test), gzipped or not; Parquet
    files hold a column of encoded images and an integer column ``label``, in ``test-*`` for ``split`` test.

    Raises:
        DataError: no images, no such split, or classes that are not ``0 .. num_classes - 1``, each at least once.

    With ``num_classes`` 0 labels are left alone, all are 0, and the images of a folder or zip may lie anywhere in it.
    """
    if not path.exists():
        raise DataError(f"data.path {path} does not exist")
    is_idx, parquet = path.is_dir() and holds_idx(path), parquet_files(path, split)
    is_npz = path.is_file() and path.suffix == ".npz"
    if split != "train" and (is_npz or (is_idx and split != "test")):
        raise no_split(path, split)
    if is_idx:
        source = _of_arrays(path, *read_idx(path, split))
    elif is_npz:
        source = _of_arrays(path, *_read_npz(path))
    elif parquet:
        rows = ParquetImages(parquet)
        source = Source(rows.labels, rows.open, rows.name, rows.class_names)
    else:
        source = _of_entries(path, split, anywhere=num_classes == 0)
    if num_classes == 0:
        return Source(np.zeros_like(source.labels), source.open, source.name)
    classes = np.unique(source.labels)
    if classes[0] < 0 or classes[-1] >= num_classes or len(classes) != num_classes:
        raise wrong_classes(path, source.labels, num_classes)
    return source


def wrong_classes(path: Path, labels: np.ndarray, num_classes: int) -> DataError:
    """The complaint about labels that are not ``0 .. num_classes - 1``."""
    found = len(np.unique(labels))
    return DataError(f"data.path {path} has {found} classes (labels {labels.min()}..{labels.max()}) but "
                     f"model.num_classes is {num_classes}; change one of them")  # fmt: skip


def no_split(path: Path, split: str) -> DataError:
    """The complaint about a part of the data that is not there."""
    return DataError(f"data.path {path} has no split {split}: that takes a folder {split} of class folders, IDX files "
                     f"(test alone), or Parquet files named {split}-*")  # fmt: skip


def _of_arrays(path: Path, images: np.ndarray, labels: np.ndarray) -> Source:
    """``images`` uint8 ``[N, H, W, 3]`` or, grey, ``[N, H, W]``."""
    return Source(labels.astype(np.int64), lambda i: Image.fromarray(images[i]), lambda i: f"{path}[{i}]")


def _of_entries(path: Path, split: Split, anywhere: bool) -> Source:
    found = _folder_entries(path, anywhere) if path.is_dir() else _zip_entries(path, anywhere)
    # One order for a folder and its zip: the same seed then draws the same batches from either.
    entries = sorted(_of_split(path, list(found), split), key=lambda entry: (entry.class_name, entry.name))
    if not entries:
        wanted = "image" if anywhere else "class folder with images"
        raise DataError(f"data.path {path} holds no {wanted} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = tuple(sorted({entry.class_name for entry in entries}))
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[entry.class_name] for entry in entries], dtype=np.int64)
    return Source(labels, lambda i: entries[i].open(), lambda i: entries[i].name, names)


def _of_split(path: Path, entries: list[_Entry], split: Split) -> list[_Entry]:
    """Those of ``split``. One folder of a split's name, or none, is the training data; several are kept apart."""
    splits = {entry.split for entry in entries}
    if len(splits) <= 1 and split == "train":
        return entries
    if split not in splits:
        if split != "train":
            raise no_split(path, split)
        others = ", ".join(sorted(f"{each}/" if each else "others" for each in splits))
        raise DataError(f"data.path {path} holds several splits ({others}) and no train/: point it at one of them")
    return [entry for entry in entries if entry.split == split]


def _split_of(folder: Path, anywhere: bool) -> Split | None:
    """By the folders above the class, outermost first; ``folder`` is relative to the data set."""
    above = folder.parts if anywhere else folder.parts[:-1]
    return next((_SPLIT_NAMES[part.casefold()] for part in above if part.casefold() in _SPLIT_NAMES), None)


def _is_image(path: Path) -> bool:
    """``CLASS/NAME`` by its suffix; hidden ones are left out (macOS zips have a ``._photo.jpg`` beside every photo)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts[-2:])


def _folder_entries(path: Path, anywhere: bool) -> Iterator[_Entry]:
    if anywhere:
        files: Iterable[Path] = path.rglob("*")
    else:
        tops = [path, *(each for each in path.iterdir() if each.is_dir() and each.name.casefold() in _SPLIT_NAMES)]
        files = (file for top in tops for file in top.glob("*/*"))
    for file in files:
        if _is_image(file):
            folder = file.parent.relative_to(path)
            yield _Entry(file.parent, str(file), partial(open_image, file), _split_of(folder, anywhere))


def _zip_entries(path: Path, anywhere: bool) -> Iterator[_Entry]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"data.path {path} is neither a folder, a zip, an npz nor a Parquet file") from error
    lock = threading.Lock()
    for name in archive.namelist():
        member = Path(name)
        if _is_image(member) and (anywhere or len(member.parts) > 1):
            opener = partial(_open_member, archive, name, lock)
            yield _Entry(member.parent, f"{path}:{name}", opener, _split_of(member.parent, anywhere))


def _open_member(archive: zipfile.ZipFile, name: str, lock: threading.Lock) -> Image.Image:
    with lock:  # an archive counts its open members, and not safely for threads
        if archive.getinfo(name).file_size > MAX_IMAGE_BYTES:
            raise DataError(f"unpacks to more than {MAX_IMAGE_BYTES} bytes")
        content = archive.read(name)
    return open_image(content)


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """No array may ask for more memory than the file can hold.

    Raises:
        ValueError: a member that does.
    """
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is neither stored nor deflated")
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            claimed = stream.tell() + math.prod(shape) * dtype.itemsize
        if claimed != member.file_size or claimed > DEFLATE_RATIO * (member.compress_size + 1):
            raise ValueError(f"{member.filename} claims {claimed} bytes, which it has not")


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            _check_sizes(archive.zip)
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
    return images, labels
