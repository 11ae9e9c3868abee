"""Feature networks that stand in for the real ones: what they see is what is there."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from train.evaluation.networks import Features


class PixelNetwork:
    """The pixels, shrunk to ``side``, are the features, and the logits."""

    name = "effnet"

    def __init__(self, side: int = 4, spatial: bool = False) -> None:
        self.side, self.spatial = side, spatial
        self.identity = f"pixels-{side}"
        self.calls = 0

    def __call__(self, images: Tensor) -> Features:
        self.calls += 1
        flat = F.adaptive_avg_pool2d(images, self.side).flatten(1)
        return Features(flat, flat, images[:, :1].flatten(1) if self.spatial else None)
