"""Classifier-free guidance per row: ``uncond + scale (cond - uncond)`` on the channels that a flavour guides."""

from __future__ import annotations

from torch import Tensor

from robuq_core.config import Flavour

GUIDED_CHANNELS_OFFICIAL = 3


def guided_channels(channels: int, flavour: Flavour) -> int:
    """Number of leading channels that guidance acts on: 3 in the flavours ``official`` and ``sit``, else all."""
    return min(GUIDED_CHANNELS_OFFICIAL, channels) if flavour in ("official", "sit") else channels


def guide(cond: Tensor, uncond: Tensor, scale: Tensor, guided: int) -> Tensor:
    """Guided output ``[B, C_out, H, W]``; ``scale`` float32 ``[B]``, ``guided``: see :func:`guided_channels`.

    The other channels, including a learned variance, are those of ``cond``.
    """
    out = cond.clone()
    weight = scale[:, None, None, None]
    out[:, :guided] = uncond[:, :guided] + weight * (cond[:, :guided] - uncond[:, :guided])
    return out
