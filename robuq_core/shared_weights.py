"""A loaded model in a memory file mapped by several processes: one copy of the weights for all of them.

The file holds the bytes of every tensor, each aligned, then a pickle of the rest, then the pickle's offset and length.
Only files that this program has just written are read.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
from typing import Any

import torch

_ALIGNMENT = 64
_TRAILER = struct.Struct("<QQ")


def store(value: Any, descriptor: int) -> None:
    """Replace the content of the file by ``value``, a picklable object with CPU tensors in it.

    Raises:
        OSError: out of memory.
    """
    os.ftruncate(descriptor, 0)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.seek(0)
        rest = io.BytesIO()
        _Writer(rest, file).dump(value)
        offset = file.tell()
        file.write(rest.getbuffer())
        file.write(_TRAILER.pack(offset, rest.tell()))


def mapped(descriptor: int) -> Any:
    """The value that :func:`store` wrote. Its tensors are in the file; writing to one copies its page."""
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    offset, length = _TRAILER.unpack_from(memory, len(memory) - _TRAILER.size)
    return _Reader(io.BytesIO(memory[offset : offset + length]), memory).load()


class _Writer(pickle.Pickler):
    def __init__(self, rest: io.BytesIO, file: io.BufferedWriter) -> None:
        super().__init__(rest, protocol=pickle.HIGHEST_PROTOCOL)
        self._file = file

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        content = value.detach().contiguous()
        self._file.write(content.reshape(-1).view(torch.uint8).numpy().data)
        return offset, content.dtype, tuple(content.shape), isinstance(value, torch.nn.Parameter)


class _Reader(pickle.Unpickler):
    def __init__(self, rest: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(rest)
        self._memory = memory

    def persistent_load(self, stored: Any) -> torch.Tensor:
        offset, dtype, shape, is_parameter = stored
        count = torch.Size(shape).numel()
        if count:
            tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).reshape(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
