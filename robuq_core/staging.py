"""Small tensors from the host to a GPU without a wait for what the GPU is doing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def staged(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The CPU's ``tensors`` on ``device``: in one copy from pinned memory, which queues up behind the work there.

    From pageable memory torch would wait for the stream. The pinned buffer is reused once the copy is done.
    """
    if device.type == "cpu":
        return tensors
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    host = _pinned(ends[-1])
    places = [slice(start, start + tensor.nbytes) for start, tensor in zip(ends, tensors, strict=False)]
    for place, tensor in zip(places, tensors, strict=True):
        host[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = host.to(device, non_blocking=True)
    return tuple(
        there[place].view(tensor.dtype).view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)
    )


def taken(x: Tensor, rows: Sequence[int]) -> Tensor:
    """``x[rows]``: ``x`` itself where that is all of it. A list as an index would make a GPU wait."""
    if len(rows) == len(x) and list(rows) == list(range(len(x))):
        return x
    return x.index_select(0, *staged(x.device, torch.tensor(rows, dtype=torch.int64)))
