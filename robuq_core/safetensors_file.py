"""A safetensors file read through one open handle into own memory, never memory-mapped.

A mapped file that is truncated or overwritten kills the process (SIGBUS), and its bytes may change between the check
of a checksum and their use. Here every byte is read once, so the verified bytes are the used ones.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robuq_core.files import parse_json

# Limits of the JSON at the start of a file, in bytes and in values; a DiT-XL/2 has 0.22 MB and 15,000.
MAX_HEADER_BYTES = 4 * 2**20
MAX_HEADER_VALUES = 2**17
_MAX_DIMENSIONS, _MAX_SIZE = 8, 2**48
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
        self._lock = threading.Lock()
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
        content = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
        self._read_into(content.numpy().data, stored.start)
        return content.view(stored.dtype).reshape(stored.shape)

    def _read_into(self, buffer: memoryview | bytearray, position: int) -> None:
        rest = memoryview(buffer)
        with self._lock:
            self._stream.seek(position)
            while rest:
                count = self._stream.readinto(rest)
                if not count:
                    raise MalformedFileError("it ends too early")
                rest = rest[count:]

    def _read_header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        size = os.fstat(self._stream.fileno()).st_size
        prefix = bytearray(8)
        self._read_into(prefix, 0)
        (length,) = struct.unpack("<Q", prefix)
        if length > size - len(prefix):
            raise MalformedFileError(f"its header of {length} bytes is longer than the file")
        if length > MAX_HEADER_BYTES:
            raise MalformedFileError(f"its header of {length} bytes is above the limit of {MAX_HEADER_BYTES}")
        text = bytearray(length)
        self._read_into(text, len(prefix))
        try:
            tree = parse_header(bytes(text))
        except ValueError as error:
            raise MalformedFileError(f"its header is not usable JSON: {error}") from error
        if not isinstance(tree, dict):
            raise MalformedFileError("its header is not a JSON object")
        metadata = tree.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise MalformedFileError("its __metadata__ is not a table of texts")
        return metadata, _placed(tree, start=len(prefix) + length, stop=size)


def parse_header(text: bytes) -> Any:
    """JSON of a header; its values are counted before they take memory.

    Raises:
        ValueError: malformed, nested too deeply, or more than :data:`MAX_HEADER_VALUES` values.
    """
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_HEADER_VALUES:
        raise ValueError(f"more than {MAX_HEADER_VALUES} values")
    return parse_json(text)


def _placed(tree: dict[str, Any], start: int, stop: int) -> dict[str, StoredTensor]:
    """The tensors of a header, which must fill the bytes ``start .. stop`` of the file without gap or overlap."""
    tensors = {name: _stored(name, entry, start) for name, entry in tree.items()}
    end = start
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if stored.start != end:
            raise MalformedFileError("its tensors overlap or leave gaps")
        end = stored.stop
    if end != stop:
        raise MalformedFileError(f"{stop - start} bytes of tensors where its header says {end - start}")
    return tensors


def _stored(name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise MalformedFileError(f"tensor {name[:80]!r} has no usable dtype, shape and data_offsets") from None
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= _MAX_SIZE for n in (*shape, start, stop)):
        raise MalformedFileError(f"tensor {name[:80]!r} has an impossible shape or offset")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise MalformedFileError(f"tensor {name[:80]!r} has a shape that does not fit its offsets")
    return StoredTensor(dtype, shape, base + start, base + stop)
