"""How well samples match the class that was asked for: nearest training photo and the classifier's verdict.

Both come with the real photos' own at the same resolution, without which they mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.evaluation.networks import Features

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Gallery:
    """Real photos as a feature network sees them: ``features [P, F]``, ``labels [P]``, ``top5 [P, 5]`` its verdicts."""

    features: Tensor
    labels: Tensor
    top5: Tensor


@dataclass(frozen=True)
class Agreement:
    """Shares of 0..1 over ``samples`` images.

    ``nearest``: the photo nearest to the sample, by cosine distance of features, is of the asked class. ``top1``,
    ``top5``: the classifier's own verdict; ``photos_*``: its verdict on the same classes' photos. The verdicts are none
    where the classes are not the classifier's, ImageNet's in their order.
    """

    samples: int
    nearest: float
    top1: float | None
    top5: float | None
    photos_top1: float | None
    photos_top5: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def gallery_of(features: Features, labels: Tensor) -> Gallery:
    return Gallery(features.pool, labels, _best_five(features.logits))


def nearest_labels(pool: Tensor, gallery: Gallery) -> Tensor:
    """The label of the photo nearest to each row of ``pool [N, F]``, by cosine distance: ``[N]``."""
    similarity = F.normalize(pool, dim=1) @ F.normalize(gallery.features, dim=1).T
    return gallery.labels[similarity.argmax(dim=1)]


def agreement(samples: Features, classes: Sequence[int], gallery: Gallery, *, classifier: bool = True) -> Agreement:
    """Compare ``samples`` of ``classes`` with the photos of ``gallery``; ``classifier``: its classes are the data's."""
    wanted = torch.tensor(classes)
    nearest = float((nearest_labels(samples.pool, gallery) == wanted).float().mean())
    if not classifier:
        return Agreement(len(samples), nearest, None, None, None, None)
    chosen = torch.isin(gallery.labels, wanted)
    top1, top5 = shares_right(_best_five(samples.logits), wanted)
    photos_top1, photos_top5 = shares_right(gallery.top5[chosen], gallery.labels[chosen])
    return Agreement(len(samples), nearest, top1, top5, photos_top1, photos_top5)


def _best_five(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def shares_right(verdicts: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of ``verdicts [N, 5]``, best first: share whose first is ``labels [N]``, and share of which any is."""
    hits = verdicts == labels[:, None]
    return float(hits[:, 0].float().mean()), float(hits.any(dim=1).float().mean())
