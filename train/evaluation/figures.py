"""The figures of one set of samples: distances to the photos, agreement with the asked class, and means over seeds.

sFID is written here from its definition (arXiv 2103.03841; which activations, as ADM's evaluation takes them); FID,
Inception score, precision and recall are torch-fidelity's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from train.data import ImageDataset, centre_images
from train.evaluation.frechet import Moments, RunningMoments, frechet_distance_of_moments
from train.evaluation.networks import EvaluationError, FeatureNetwork, Features, library
from train.evaluation.reference import Gallery, Reference, best_five
from train.evaluation.samples import SampleSet

IMAGENET_CLASSES = 1000
SCORE_SPLITS = 10
NEIGHBOURS = 3
_PAIRS_AT_ONCE = 4096  # rows and columns of a block of the distance matrix
_PHOTOS_AT_ONCE = 64
# Of values in [-1, 1]. Pixels are bytes: an error below that of rounding to them cannot be measured.
_PEAK_SQUARED, _ROUNDING = 4.0, (2 / 255) ** 2 / 12
_BATCH = 64


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over seeds with its 95% t-interval; ``half_width`` none of a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float | None:
        count = len(self.values)
        return None if count < 2 else float(stats.t.ppf(0.975, count - 1) * stats.sem(self.values))

    def as_dict(self) -> dict[str, Any]:
        """``mean``, ``interval`` (low, high; none of one seed) and ``by_seed``."""
        half = self.half_width
        interval = None if half is None else [self.mean - half, self.mean + half]
        return {"mean": self.mean, "interval": interval, "by_seed": list(self.values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """``values`` over ``base``, seed by seed; none where a base is zero."""
    if any(each == 0 for each in base):
        return None
    return Estimate(tuple(a / b for a, b in zip(values, base, strict=True)))


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
    top1, top5 = shares_right(best_five(samples.logits), wanted)
    photos_top1, photos_top5 = shares_right(gallery.top5[chosen], gallery.labels[chosen])
    return Agreement(len(samples), nearest, top1, top5, photos_top1, photos_top5)


def shares_right(verdicts: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of ``verdicts [N, 5]``, best first: share whose first is ``labels [N]``, and share of which any is."""
    hits = verdicts == labels[:, None]
    return float(hits[:, 0].float().mean()), float(hits.any(dim=1).float().mean())


@dataclass(frozen=True)
class PixelAgreement:
    """``psnr``: of a sample to the nearest photo of the asked class, in dB, averaged over samples; none if no class has
    a photo. ``pixel_nearest``: share of 0..1 of samples whose nearest photo is of the asked class."""

    psnr: float | None
    pixel_nearest: float

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def pixel_agreement(samples: Tensor, classes: Sequence[int], photos: ImageDataset) -> PixelAgreement:
    """Compare ``samples [N, 3, S, S]`` in [-1, 1], of ``classes``, with the centre crops of ``photos``.

    Nearest is by mean squared error, and ``PSNR = 10 log10(4 / MSE)``; at most 58.9 dB, where the MSE is that of
    rounding to bytes.
    """
    flat, wanted = samples.flatten(1).double(), torch.tensor(classes)
    nearest = torch.full((len(flat),), torch.inf, dtype=torch.float64)
    nearest_of_class, label = nearest.clone(), torch.full((len(flat),), -1)
    for first in range(0, len(photos), _PHOTOS_AT_ONCE):
        rows = slice(first, first + _PHOTOS_AT_ONCE)
        crops = centre_images(photos, samples.shape[-1], rows).expand(-1, samples.shape[1], -1, -1)
        errors = _mean_squared_errors(flat, crops.flatten(1).double())
        least, at = errors.min(dim=1)
        label = torch.where(least < nearest, photos.labels[rows][at], label)
        nearest = torch.minimum(nearest, least)
        others = photos.labels[rows] != wanted[:, None]
        nearest_of_class = torch.minimum(nearest_of_class, errors.masked_fill(others, torch.inf).amin(dim=1))
    known = nearest_of_class[nearest_of_class.isfinite()].clamp(min=_ROUNDING)
    psnr = float((10 * (_PEAK_SQUARED / known).log10()).mean()) if len(known) else None
    return PixelAgreement(psnr, float((label == wanted).float().mean()))


def _mean_squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """``[N, M]`` of ``a [N, D]`` and ``b [M, D]``; float64, in which the difference of the sums keeps its digits."""
    sums = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return sums / a.shape[1]


def fid(samples: Moments, photos: Moments) -> float:
    """FID of the moments of pool features."""
    compare = library("metric_fid").fid_statistics_to_metric
    return float(compare(_statistics(samples), _statistics(photos), verbose=False)["frechet_inception_distance"])


def sfid(samples: Moments, photos: Moments) -> float:
    """sFID: the Fréchet distance of spatial features."""
    return frechet_distance_of_moments(samples, photos)


def inception_score(logits: Tensor) -> float:
    """Mean over ten parts of ``exp(E KL(p(y|x) || p(y)))`` of unbiased ``logits [N, K]``."""
    score = library("metric_isc").isc_features_to_metric(logits, splits=min(SCORE_SPLITS, len(logits)))
    return float(score["inception_score_mean"])


def precision_and_recall(samples: Tensor, photos: Tensor) -> tuple[float, float]:
    """Of pool features ``[N, F]`` and ``[M, F]``, each more than three: share of samples within the manifold of the
    photos, and the other way round; a manifold is the union of balls up to the third neighbour (arXiv 1904.06991)."""
    if min(len(samples), len(photos)) <= NEIGHBOURS:
        raise EvaluationError(f"precision and recall need more than {NEIGHBOURS} samples and photos, not "
                              f"{len(samples)} and {len(photos)}: raise evaluation.samples")  # fmt: skip
    measure = library("metric_prc").calculate_precision_recall_part
    precision, recall = measure(samples, photos, neighborhood=NEIGHBOURS, batch_size=_PAIRS_AT_ONCE)
    return float(precision), float(recall)


def _statistics(moments: Moments) -> dict[str, Any]:
    return {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}


def effnet_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fd_effnet``: Fréchet distance of EfficientNet-Lite0 features (no FID: other features, other scale).
    ``nearest``: share of samples whose nearest photo is of the asked class."""
    moments, right = RunningMoments(), 0
    for first in range(0, len(samples), _BATCH):
        features = network(samples.batch(first, _BATCH))
        moments.add(features.pool)
        wanted = torch.from_numpy(samples.labels[first : first + _BATCH])
        right += int((nearest_labels(features.pool, reference.gallery) == wanted).sum())
    distance = frechet_distance_of_moments(moments.result(), reference.pool)
    return {"fd_effnet": distance, "nearest": right / len(samples)}


def inception_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fid``, ``sfid``, ``inception_score``, ``precision``, ``recall``."""
    pool, spatial = RunningMoments(), RunningMoments()
    pools: list[Tensor] = []
    logits: list[Tensor] = []
    for first in range(0, len(samples), _BATCH):
        features = network(samples.batch(first, _BATCH))
        pool.add(features.pool)
        pools.append(features.pool)
        logits.append(features.logits)
        assert features.spatial is not None
        spatial.add(features.spatial)
    assert reference.spatial is not None
    precision, recall = precision_and_recall(torch.cat(pools), reference.gallery.features)
    return {
        "fid": fid(pool.result(), reference.pool),
        "sfid": sfid(spatial.result(), reference.spatial),
        "inception_score": inception_score(torch.cat(logits)),
        "precision": precision,
        "recall": recall,
    }


def dinov2_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fd_dinov2``: Fréchet distance of DINOv2's class tokens."""
    moments = RunningMoments()
    for first in range(0, len(samples), _BATCH):
        moments.add(network(samples.batch(first, _BATCH)).pool)
    return {"fd_dinov2": frechet_distance_of_moments(moments.result(), reference.pool)}
