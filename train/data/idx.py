"""IDX files, the format of MNIST and Fashion-MNIST: a big-endian header, then unsigned bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from train.data.errors import DataError
from train.data.pictures import DEFLATE_RATIO
from train.messages import one_line

_PREFIX = {"train": "train", "test": "t10k"}
_KINDS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
_UNSIGNED_BYTE = 0x08


def holds_idx(folder: Path) -> bool:
    """Whether ``folder`` is laid out as MNIST is."""
    return any(_find(folder, prefix, "images") for prefix in _PREFIX.values())


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 ``[N, H, W]`` and labels uint8 ``[N]`` of ``split`` (train or test).

    Raises:
        DataError: a file is missing, cut short or of another kind, or the two differ in number.
    """
    arrays = {}
    for kind, dimensions in (("images", 3), ("labels", 1)):
        path = _find(folder, _PREFIX[split], kind)
        if path is None:
            raise DataError(f"data.path {folder} lacks {_PREFIX[split]}-{_KINDS[kind]} or its .gz (data.split {split})")
        arrays[kind] = _read(path, dimensions)
    images, labels = arrays["images"], arrays["labels"]
    if len(images) != len(labels):
        raise DataError(f"data.path {folder}: {len(images)} images but {len(labels)} labels in split {split}")
    if not images.size:
        raise DataError(f"data.path {folder} holds no image")
    return images, labels


def _find(folder: Path, prefix: str, kind: str) -> Path | None:
    name = f"{prefix}-{_KINDS[kind]}"
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """The array of a file, of which no more is unpacked than its header says."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
                raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimension(s); fetch it again")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            most = path.stat().st_size * (DEFLATE_RATIO if packed else 1)
            content = stream.read(size + 1) if size <= most else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file ({one_line(error)}); fetch it again") from error
    if len(content) != size:
        found = f"more than {size}" if len(content) > size else str(len(content) or "fewer")
        raise DataError(f"{path}: {found} bytes where its header says {'x'.join(map(str, shape))}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
