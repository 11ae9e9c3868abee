"""A loaded model in a file in memory, mapped by several processes: one copy of its weights, however many there are.

The file holds the bytes of every tensor, each aligned, then everything else as a pickle, then the pickle's place.
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
_TRAILER = struct.Struct("<QQ")  # offset and length of the pickle


def store(value: Any, descriptor: int) -> None:
    """Replace the content of the file by ``value``: any picklable object with tensors on the CPU in it.

    Raises:
        OSError: no memory for it.
    """
    os.ftruncate(descriptor, 0)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.seek(0)
        rest = io.BytesIO()
        _Writer(rest, file).dump(value)
        place = file.tell()
        file.write(rest.getbuffer())
        file.write(_TRAILER.pack(place, rest.tell()))


def mapped(descriptor: int) -> Any:
    """What :func:`store` was given. Its tensors lie in the file; a process that writes to one gets a copy of a page."""
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    place, length = _TRAILER.unpack_from(memory, len(memory) - _TRAILER.size)
    return _Reader(io.BytesIO(memory[place : place + length]), memory).load()


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
        is_parameter = isinstance(value, torch.nn.Parameter)
        return offset, content.dtype, tuple(content.shape), is_parameter


class _Reader(pickle.Unpickler):
    def __init__(self, rest: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(rest)
        self._memory = memory

    def persistent_load(self, place: Any) -> torch.Tensor:
        offset, dtype, shape, is_parameter = place
        count = torch.Size(shape).numel()
        if count:
            tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).reshape(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
