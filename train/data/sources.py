"""Labelled images as they come: class folders, a zip of them, npz, Parquet or IDX, opened one image at a time.

Nothing here knows the size that a model wants; :func:`read_square` is given it.
"""

from __future__ import annotations

import bisect
import gzip
import math
import struct
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from train.data.pictures import IMAGE_SUFFIXES, DataError, Fit, eight_bit, open_image, square
from train.logs import one_line

Split = Literal["train", "val", "test"]
_SPLIT_NAMES: dict[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val",
                                  "validation": "val", "test": "test", "testing": "test"}  # fmt: skip

# No photo is larger; a member of a zip says how large it is before it is unpacked.
MAX_IMAGE_BYTES = 2**28
# Most bytes that deflate makes of one.
_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class Source:
    """A data set before it is read: ``labels`` int64 ``[N]``, and image ``i`` by ``open(i)``, called ``name(i)``.

    Images are opened cheapest in rising order.
    """

    labels: np.ndarray
    open: Callable[[int], Image.Image]
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)


def open_source(path: Path, num_classes: int, split: Split = "train") -> Source:
    """The images of ``path``, none read yet; docs/training.md lists the layouts.

    With ``num_classes`` 0 labels are left alone, all are 0, and the images of a folder or zip may lie anywhere in it.
    Raises DataError if there are no images, no such split, or classes that are not ``0 .. num_classes - 1``, each at
    least once.
    """
    if not path.exists():
        raise DataError(f"data.path {path} does not exist")
    is_npz, is_idx = path.is_file() and path.suffix == ".npz", path.is_dir() and holds_idx(path)
    if split != "train" and (is_npz or (is_idx and split != "test")):
        raise no_split(path, split)
    if is_npz:
        source = _of_arrays(path, *_read_npz(path))
    elif is_idx:
        source = _of_arrays(path, *read_idx(path, split))
    elif parquet := parquet_files(path, split):
        images = ParquetImages(parquet)
        source = Source(images.labels, images.open, images.name)
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


def read_square(
    source: Source, index: int, size: int, fit: Fit, channels: int, transparent: list[str] | None = None
) -> np.ndarray:
    """Image ``index`` as uint8 ``[channels, size, size]``; three ``channels`` are RGB, one is grey.

    ``transparent`` gets its name if it has transparency. Raises DataError if it is unreadable.
    """
    try:
        image = source.open(index)
        if transparent is not None and image.has_transparency_data:
            transparent.append(source.name(index))
        image = eight_bit(image, channels)
    except Exception as error:  # a damaged file leads decoders to raise almost anything
        raise DataError(f"{source.name(index)}: not a readable image ({one_line(error)}); remove it or replace it"
                        ) from error  # fmt: skip
    return np.ascontiguousarray(np.asarray(square(image, size, fit)).reshape(size, size, channels).transpose(2, 0, 1))


# Folders and zips.


class _Entry(NamedTuple):
    """An image: the folder it lies in, its name in messages, how to open it, and the split that a folder above its
    class is named after, if one is."""

    folder: Path
    name: str
    open: Callable[[], Image.Image]
    split: Split | None

    @property
    def class_name(self) -> str:
        """In NFC, so that macOS's decomposed names sort and compare as others do."""
        return unicodedata.normalize("NFC", self.folder.name)


def _of_entries(path: Path, split: Split, anywhere: bool) -> Source:
    found = _folder_entries(path, anywhere) if path.is_dir() else _zip_entries(path, anywhere)
    # One order for a folder and its zip: the same seed then draws the same batches from either.
    entries = sorted(_of_split(path, list(found), split), key=lambda entry: (entry.class_name, entry.name))
    if not entries:
        wanted = "image" if anywhere else "class folder with images"
        raise DataError(f"data.path {path} holds no {wanted} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    number = {name: i for i, name in enumerate(sorted({entry.class_name for entry in entries}))}
    labels = np.array([number[entry.class_name] for entry in entries], dtype=np.int64)
    return Source(labels, lambda i: entries[i].open(), lambda i: entries[i].name)


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
    """``CLASS/NAME`` by its suffix; hidden ones are skipped (macOS zips have a ``._photo.jpg`` beside every photo)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts[-2:])


def _folder_entries(path: Path, anywhere: bool) -> Iterator[_Entry]:
    tops = [path, *(each for each in path.iterdir() if each.is_dir() and each.name.casefold() in _SPLIT_NAMES)]
    files = path.rglob("*") if anywhere else (file for top in tops for file in top.glob("*/*"))
    for file in filter(_is_image, files):
        split = _split_of(file.parent.relative_to(path), anywhere)
        yield _Entry(file.parent, str(file), partial(open_image, file), split)


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


# Arrays: npz and IDX.


def _of_arrays(path: Path, images: np.ndarray, labels: np.ndarray) -> Source:
    """``images`` uint8 ``[N, H, W, 3]`` or, grey, ``[N, H, W]``."""
    if not images.size:
        raise DataError(f"data.path {path} holds no image")
    return Source(labels.astype(np.int64), lambda i: Image.fromarray(images[i]), lambda i: f"{path}[{i}]")


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """No array may ask for more memory than the file can hold. Raises ValueError."""
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is neither stored nor deflated")
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            claimed = stream.tell() + math.prod(shape) * dtype.itemsize
        if claimed != member.file_size or claimed > _DEFLATE_RATIO * (member.compress_size + 1):
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
    return images, labels


_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08


def holds_idx(folder: Path) -> bool:
    """Whether ``folder`` is laid out as MNIST is."""
    return any(_find_idx(folder, f"{prefix}-images-idx3-ubyte") for prefix in _PREFIX.values())


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 ``[N, H, W]`` and labels uint8 ``[N]`` of ``split`` (train or test).

    Raises DataError if a file is missing, cut short or of another kind, or the two differ in number.
    """
    arrays = []
    for kind, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
        name = f"{_PREFIX[split]}-{kind}"
        if (path := _find_idx(folder, name)) is None:
            raise DataError(f"data.path {folder} lacks {name} or its .gz (data.split {split})")
        arrays.append(_read_array(path, dimensions))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(f"data.path {folder}: {len(images)} images but {len(labels)} labels in split {split}")
    return images, labels


def _find_idx(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read_array(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file, of which no more is unpacked than its header says."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
                raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimension(s); fetch it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            most = path.stat().st_size * (_DEFLATE_RATIO if packed else 1)
            content = stream.read(size + 1) if size <= most else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file ({one_line(error)}); fetch it again") from error
    if len(content) != size:
        found = f"more than {size}" if len(content) > size else str(len(content) or "fewer")
        raise DataError(f"{path}: {found} bytes where its header says {'x'.join(map(str, shape))}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


# Parquet, as image data sets on the Hugging Face Hub are laid out: a struct of encoded bytes, and a label.

# Readers run a little apart from each other: at a boundary two groups are in use.
_GROUPS_KEPT = 2
_PREFIXES = {"train": ("train-",), "val": ("val-", "validation-"), "test": ("test-",)}


def parquet_files(path: Path, split: str) -> list[Path]:
    """``path`` itself, or the folder's files called ``SPLIT-*.parquet`` (``validation-`` for ``val``).

    Where no file is named after a split, all of them are ``train``.
    """
    files = [each for each in ([path] if path.is_file() else sorted(path.iterdir())) if each.suffix == ".parquet"]
    named = [file for file in files if file.name.startswith(_PREFIXES[split])]
    if named or split != "train":
        return named
    others = [file for file in files if file.name.startswith(_PREFIXES["val"] + _PREFIXES["test"])]
    if others and path.is_dir():
        raise DataError(f"data.path {path} holds {others[0].name} but no train-*.parquet; set data.split, or rename "
                        "the files that are the training data")  # fmt: skip
    return files


class ParquetImages:
    """The rows of ``files``, in order; :attr:`labels` int64 ``[N]``.

    Raises DataError if pyarrow is missing, or a file is unreadable or has no image and label column.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"{files[0]}: reading Parquet needs pyarrow ({error}); from a checkout: "
                            "pip install '.[train]'") from error  # fmt: skip
        self._groups: list[tuple[Path, Any, int]] = []  # path, open file, number of the row group in it
        self._starts: list[int] = []
        self._cache: dict[int, Any] = {}
        self._lock = threading.Lock()
        labels, rows = [], 0
        for path in files:
            try:
                file = parquet.ParquetFile(path)
                self._image, label = _columns(path, file.schema_arrow)
                labels.append(file.read(columns=[label]).column(0).to_numpy())
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors or OSErrors
                raise DataError(f"{path}: not a readable Parquet file ({one_line(error)}); fetch it again") from error
            if labels[-1].dtype.kind not in "iu":
                raise DataError(f"{path}: column {label} has rows without a label; remove them")
            for group in range(file.num_row_groups):
                self._groups.append((path, file, group))
                self._starts.append(rows)
                rows += file.metadata.row_group(group).num_rows
        if not rows:
            raise DataError(f"data.path {files[0].parent} holds no image")
        self.labels = np.concatenate(labels).astype(np.int64)

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        path, _, group = self._groups[number]
        return f"{path}: row {index - self._starts[number]} of its row group {group}"

    def open(self, index: int) -> Image.Image:
        number = bisect.bisect_right(self._starts, index) - 1
        content = self._column(number)[index - self._starts[number]].as_py()
        return open_image(content["bytes"] if isinstance(content, dict) else content)

    def _column(self, number: int) -> Any:
        with self._lock:
            if number not in self._cache:
                _, file, group = self._groups[number]
                self._cache[number] = file.read_row_group(group, columns=[self._image]).column(0)
                if len(self._cache) > _GROUPS_KEPT:
                    del self._cache[next(iter(self._cache))]
            return self._cache[number]


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """Names of the image and of the label column."""
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def holds_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_binary(field.type) for field in kind)
        return is_binary(kind)

    images = [field.name for field in schema if holds_image(field.type)]
    integers = [field.name for field in schema if types.is_integer(field.type)]
    labels = ["label"] if "label" in integers else integers
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(f"{path}: expected one column of images (bytes, or a struct with bytes) and an integer column "
                        f"label, not {found}")  # fmt: skip
    return images[0], labels[0]
