"""The figures of one set of samples: distances to the photos, agreement with the asked class, and means over seeds.

sFID is written here from its definition (arXiv 2103.03841; which activations, as ADM's evaluation takes them); FID,
Inception score, precision and recall are torch-fidelity's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import linalg, stats
from torch import Tensor

from train.data import ImageDataset, to_unit
from train.evaluation.networks import EvaluationError, Features, library

IMAGENET_CLASSES = 1000
SCORE_SPLITS = 10
NEIGHBOURS = 3
_PAIRS_AT_ONCE = 4096  # rows and columns of a block of the distance matrix
_PHOTOS_AT_ONCE = 64
# Of values in [-1, 1]. Pixels are bytes: an error below that of rounding to them cannot be measured.
_PEAK_SQUARED, _ROUNDING = 4.0, (2 / 255) ** 2 / 12


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds: ``mean``, ``interval`` (95%, Student's t: low, high; none of one seed) and ``by_seed``."""
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "by_seed": list(values)}


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
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """``features [B, F]``, any float type."""
        x, count = features.double(), len(features)
        mean, total = x.mean(dim=0), self.count + count
        shift = mean - self._mean
        scatter = (x - mean).T @ (x - mean) + torch.outer(shift, shift) * (self.count * count / total)
        self._scatter, self._mean = self._scatter + scatter, self._mean + shift * (count / total)
        self.count = total

    def result(self) -> Moments:
        """Raises EvaluationError of fewer than two samples."""
        if self.count < 2:
            raise EvaluationError(f"a Fréchet distance needs at least 2 samples a set, not {self.count}")
        return Moments(self.count, self._mean, self._scatter / (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance of two sets of features, each taken as a normal (arXiv 1706.08500, eq. 6); never below 0.

    ``|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)``. The last trace is never taken from a matrix square
    root: with ``S = L^T L`` the eigenvalues of ``S_a S_b`` are the squared singular values of ``L_a L_b^T``, so the
    trace is their sum. That holds for singular covariances too, which fewer samples than features always give.

    Biased upwards, the more so the fewer samples: compare figures of equal numbers alone. Raises EvaluationError if the
    numbers of features differ, or values are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(f"moments of {len(a.mean)} and {len(b.mean)} features: not of one network")
    if not all(bool(each.mean.isfinite().all() and each.covariance.isfinite().all()) for each in (a, b)):
        raise EvaluationError("features are not finite: the images or the network's weights are damaged")
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def _root(covariance: Tensor) -> Tensor:
    """``L [R, F]`` with ``L^T L`` the covariance."""
    # Not torch's: MKL fails to converge on some covariances of nearly equal images, as a new network generates.
    values, vectors = map(torch.from_numpy, linalg.eigh(covariance.numpy()))
    # Below this an eigenvalue is rounding; its root would not be small.
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    root: Tensor = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return root


@dataclass(frozen=True)
class Gallery:
    """Real photos as a feature network sees them: ``features [P, F]``, ``labels [P]``, ``top5 [P, 5]`` its verdicts."""

    features: Tensor
    labels: Tensor
    top5: Tensor


def best_five(logits: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


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
    """Compare ``samples [N, 3, S, S]`` in [-1, 1], of ``classes``, with ``photos`` of their size.

    ``psnr``: of a sample to the nearest photo of the asked class, in dB, averaged over samples; none if no class has a
    photo. ``pixel_nearest``: share of 0..1 of samples whose nearest photo is of the asked class. Nearest is by mean
    squared error, and ``PSNR = 10 log10(4 / MSE)``; at most 58.9 dB, where the MSE is that of rounding to bytes.
    """
    flat, wanted = samples.flatten(1).double(), torch.tensor(classes)
    nearest = torch.full((len(flat),), torch.inf, dtype=torch.float64)
    nearest_of_class, label = nearest.clone(), torch.full((len(flat),), -1)
    for first in range(0, len(photos), _PHOTOS_AT_ONCE):
        rows = slice(first, first + _PHOTOS_AT_ONCE)
        pixels = to_unit(photos.images[rows]).expand(-1, samples.shape[1], -1, -1).flatten(1).double()
        # In float64 the difference of the sums keeps its digits.
        sums = flat.square().sum(dim=1)[:, None] + pixels.square().sum(dim=1)
        errors = (sums - 2 * flat @ pixels.T) / flat.shape[1]
        least, at = errors.min(dim=1)
        label = torch.where(least < nearest, photos.labels[rows][at], label)
        nearest = torch.minimum(nearest, least)
        others = photos.labels[rows] != wanted[:, None]
        nearest_of_class = torch.minimum(nearest_of_class, errors.masked_fill(others, torch.inf).amin(dim=1))
    known = nearest_of_class[nearest_of_class.isfinite()].clamp(min=_ROUNDING)
    psnr = float((10 * (_PEAK_SQUARED / known).log10()).mean()) if len(known) else None
    return {"psnr": psnr, "pixel_nearest": float((label == wanted).float().mean())}


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
