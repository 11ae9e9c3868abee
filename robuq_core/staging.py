"""Small tensors from the host to a GPU without a wait for what the GPU is doing."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``: from the CPU through pinned memory, so that the copy queues up behind the work there.

    From pageable memory torch would wait for the stream. The pinned buffer is reused once the copy is done.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
