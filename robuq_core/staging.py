"""Small tensors from the host to a GPU without a wait for what the GPU is doing."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the CPU, on ``device``: through pinned memory, so that the copy queues up behind the work there.

    From pageable memory torch would wait for the stream. The pinned buffer is reused once the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def staged_together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Float32 ``tensors`` on ``device`` by one copy; views of one buffer there."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    row = staged(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = torch.split(row, [tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
