"""Classifier-free guidance, per row: ``uncond + scale (cond - uncond)`` on the channels that a flavour guides."""

from __future__ import annotations

from torch import Tensor

from robuq_core.config import Flavour

GUIDED_CHANNELS_OFFICIAL = 3


def guide(cond: Tensor, uncond: Tensor, scale: Tensor, channels: int, flavour: Flavour) -> Tensor:
    """Guided output ``[B, C_out, H, W]``; ``scale`` float32 ``[B]``.

    Flavours ``official`` and ``sit`` guide the first 3 of the ``channels`` prediction channels, the others all; the
    rest (and a learned variance) is the conditional half's.
    """
    guided = min(GUIDED_CHANNELS_OFFICIAL, channels) if flavour in ("official", "sit") else channels
    out = cond.clone()
    weight = scale[:, None, None, None]
    out[:, :guided] = uncond[:, :guided] + weight * (cond[:, :guided] - uncond[:, :guided])
    return out
