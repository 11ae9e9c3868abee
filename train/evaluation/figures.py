"""The figures of one set of samples: distances to the photos, agreement with the asked class, and means over seeds.

sFID is written here from its definition (arXiv 2103.03841; which activations, as ADM's evaluation takes them); FID,
Inception score, precision and recall are torch-fidelity's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from train.data import ImageDataset, centre_images
from train.evaluation.networks import EvaluationError, FeatureNetwork, Features, library

if TYPE_CHECKING:
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
class Moments:
    """Mean ``[F]`` and unbiased covariance ``[F, F]``, float64, of ``count`` samples."""

    count: int
    mean: Tensor
    covariance: Tensor


class RunningMoments:
    """Moments of features that come in batches; holds ``[F, F]`` and no feature (Chan's pairwise update)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """``features [B, F]``, any float type."""
        x = features.double()
        mean, count = x.mean(dim=0), len(x)
        scatter = (x - mean).T @ (x - mean)
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total, shift = self.count + count, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def result(self) -> Moments:
        """Raises:
        EvaluationError: fewer than two samples.
        """
        if self.count < 2:
            raise EvaluationError(f"a Fréchet distance needs at least 2 samples a set, not {self.count}")
        assert self._mean is not None
        assert self._scatter is not None
        return Moments(self.count, self._mean, self._scatter / (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance of two sets of features, each taken as a normal (arXiv 1706.08500, eq. 6); never below 0.

    ``|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)``. The last trace is never taken from a matrix square
    root: with ``S = L^T L`` the eigenvalues of ``S_a S_b`` are the squared singular values of ``L_a L_b^T``, so the
    trace is their sum. That holds for singular covariances too, which fewer samples than features always give.

    Biased upwards, the more so the fewer samples: compare figures of equal numbers alone.

    Raises:
        EvaluationError: numbers of features that differ, or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(f"moments of {len(a.mean)} and {len(b.mean)} features: not of one network")
    for moments in (a, b):
        if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.covariance).all()):
            raise EvaluationError("features are not finite: the images or the network's weights are damaged")
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def _root(covariance: Tensor) -> Tensor:
    """``L [R, F]`` with ``L^T L`` the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Below this an eigenvalue is rounding; its root would not be small.
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    kept = values > floor
    root: Tensor = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return root


@dataclass(frozen=True)
class Gallery:
    """Real photos as a feature network sees them: ``features [P, F]``, ``labels [P]``, ``top5 [P, 5]`` its verdicts."""

    features: Tensor
    labels: Tensor
    top5: Tensor


def gallery_of(features: Features, labels: Tensor) -> Gallery:
    return Gallery(features.pool, labels, best_five(features.logits))


def best_five(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


@dataclass(frozen=True)
class Reference:
    """Of the training photos: moments of ``pool`` and, where the network has them, ``spatial`` features; a random part
    of the photos themselves as ``gallery``. ``digest`` names data and network."""

    digest: str
    pool: Moments
    spatial: Moments | None
    gallery: Gallery


def nearest_labels(pool: Tensor, gallery: Gallery) -> Tensor:
    """The label of the photo nearest to each row of ``pool [N, F]``, by cosine distance: ``[N]``."""
    similarity = F.normalize(pool, dim=1) @ F.normalize(gallery.features, dim=1).T
    return gallery.labels[similarity.argmax(dim=1)]


def agreement(
    samples: Features, classes: Sequence[int], gallery: Gallery, *, classifier: bool = True
) -> dict[str, Any]:
    """Shares of 0..1 of ``samples`` that agree with their ``classes``.

    ``nearest``: the photo nearest to the sample, by cosine distance of features, is of the asked class. ``top1``,
    ``top5``: the network's own verdict; ``photos_*``: its verdict on the same classes' photos. The verdicts are none
    unless ``classifier``: the classes are the network's, ImageNet's in their order.
    """
    wanted = torch.tensor(classes)
    nearest = float((nearest_labels(samples.pool, gallery) == wanted).float().mean())
    verdicts: tuple[float | None, ...] = (None,) * 4
    if classifier:
        chosen = torch.isin(gallery.labels, wanted)
        verdicts = (*shares_right(best_five(samples.logits), wanted),
                    *shares_right(gallery.top5[chosen], gallery.labels[chosen]))  # fmt: skip
    names = ("top1", "top5", "photos_top1", "photos_top5")
    return {"samples": len(samples), "nearest": nearest, **dict(zip(names, verdicts, strict=True))}


def shares_right(verdicts: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of ``verdicts [N, 5]``, best first: share whose first is ``labels [N]``, and share of which any is."""
    hits = verdicts == labels[:, None]
    return float(hits[:, 0].float().mean()), float(hits.any(dim=1).float().mean())


def pixel_agreement(samples: Tensor, classes: Sequence[int], photos: ImageDataset) -> dict[str, float | None]:
    """Compare ``samples [N, 3, S, S]`` in [-1, 1], of ``classes``, with the centre crops of ``photos``.

    ``psnr``: of a sample to the nearest photo of the asked class, in dB, averaged over samples; none if no class has a
    photo. ``pixel_nearest``: share of 0..1 of samples whose nearest photo is of the asked class. Nearest is by mean
    squared error, and ``PSNR = 10 log10(4 / MSE)``; at most 58.9 dB, where the MSE is that of rounding to bytes.
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
    return {"psnr": psnr, "pixel_nearest": float((label == wanted).float().mean())}


def _mean_squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """``[N, M]`` of ``a [N, D]`` and ``b [M, D]``; float64, in which the difference of the sums keeps its digits."""
    sums = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return sums / a.shape[1]


def fid(samples: Moments, photos: Moments) -> float:
    """FID of the moments of pool features."""
    both = [{"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (samples, photos)]
    found = library("metric_fid").fid_statistics_to_metric(*both, verbose=False)
    return float(found["frechet_inception_distance"])


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


def effnet_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fd_effnet``: Fréchet distance of EfficientNet-Lite0 features (no FID: other features, other scale).
    ``nearest``: share of samples whose nearest photo is of the asked class."""
    moments, right = RunningMoments(), 0
    for first in range(0, len(samples), _BATCH):
        features = network(samples.batch(first, _BATCH))
        moments.add(features.pool)
        wanted = torch.from_numpy(samples.labels[first : first + _BATCH])
        right += int((nearest_labels(features.pool, reference.gallery) == wanted).sum())
    distance = frechet_distance(moments.result(), reference.pool)
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
        "sfid": frechet_distance(spatial.result(), reference.spatial),
        "inception_score": inception_score(torch.cat(logits)),
        "precision": precision,
        "recall": recall,
    }


def dinov2_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fd_dinov2``: Fréchet distance of DINOv2's class tokens."""
    moments = RunningMoments()
    for first in range(0, len(samples), _BATCH):
        moments.add(network(samples.batch(first, _BATCH)).pool)
    return {"fd_dinov2": frechet_distance(moments.result(), reference.pool)}
