"""A safetensors file read through one open handle into own memory, never memory-mapped.

A mapped file that is truncated or overwritten kills the process (SIGBUS), and its bytes may change between the check
of a checksum and their use. Here every byte is read once, so the verified bytes are the used ones.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robuq_core.files import parse_json

# Limits of the JSON at the start of a file, in bytes and in values; a DiT-XL/2 has 0.22 MB and 15,000.
MAX_HEADER_BYTES = 4 * 2**20
MAX_HEADER_VALUES = 2**17
_MAX_DIMENSIONS = 8
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class MalformedFileError(ValueError):
    """Not a whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True)
class StoredTensor:
    """``start`` and ``stop``: its bytes, from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file: ``metadata`` and, by name, ``tensors``. A context manager; may be read from several threads.

    The header is checked against the size of the file, so that no number in it can ask for more memory than that.

    Raises:
        OSError: it cannot be opened or read. MalformedFileError: not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("rb", buffering=0)
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in memory of its own.

        Raises:
            MalformedFileError: the file has become shorter. OSError: it cannot be read.
        """
        stored = self.tensors[name]
        return self._bytes(stored.start, stored.stop).view(stored.dtype).reshape(stored.shape)

    def _bytes(self, start: int, stop: int) -> Tensor:
        content = torch.empty(stop - start, dtype=torch.uint8)
        rest = memoryview(content.numpy().data)
        while rest:
            count = os.preadv(self._stream.fileno(), [rest], stop - len(rest))
            if not count:
                raise MalformedFileError("it ends too early")
            rest = rest[count:]
        return content

    def _read_header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        size = os.fstat(self._stream.fileno()).st_size
        (length,) = struct.unpack("<Q", self._bytes(0, 8).numpy().data)
        start = 8 + length
        if start > size:
            raise MalformedFileError(f"its header of {length} bytes is longer than the file")
        if length > MAX_HEADER_BYTES:
            raise MalformedFileError(f"its header of {length} bytes is above the limit of {MAX_HEADER_BYTES}")
        try:
            tree = parse_header(self._bytes(8, start).numpy().tobytes())
        except ValueError as error:
            raise MalformedFileError(f"its header is not usable JSON: {error}") from error
        metadata = tree.pop("__metadata__", {}) if isinstance(tree, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise MalformedFileError("its header is not a JSON object, or __metadata__ in it no table of texts")
        tensors = {name: _stored(name, entry, start, size) for name, entry in tree.items()}
        if (total := sum(each.stop - each.start for each in tensors.values())) != size - start:
            raise MalformedFileError(f"{size - start} bytes of tensors where its header says {total}")
        return metadata, tensors


def parse_header(text: bytes) -> Any:
    """JSON of a header; its values are counted before they take memory.

    Raises:
        ValueError: malformed, nested too deeply, or more than :data:`MAX_HEADER_VALUES` values.
    """
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_HEADER_VALUES:
        raise ValueError(f"more than {MAX_HEADER_VALUES} values")
    return parse_json(text)


def _stored(name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        sound = len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        sound = sound and stop - start == math.prod(shape) * dtype.itemsize and base + stop <= size
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise MalformedFileError(f"tensor {name[:80]!r} has no usable dtype, shape and data_offsets")
    return StoredTensor(dtype, shape, base + start, base + stop)
