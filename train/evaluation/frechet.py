"""The Fréchet distance between two sets of features, each taken as a normal (arXiv 1706.08500, eq. 6).

``|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)``. The last trace is never taken from a matrix square root:
with ``S = L^T L`` the eigenvalues of ``S_a S_b`` are the squared singular values of ``L_a L_b^T``, so the trace is
their sum. That holds for singular covariances too, which fewer samples than features always give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.evaluation.networks import EvaluationError


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
        _check_count(self.count)
        assert self._mean is not None
        assert self._scatter is not None
        return Moments(self.count, self._mean, self._scatter / (self.count - 1))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of ``features_a [N, F]`` and ``features_b [M, F]``, computed in float64; never below 0.

    Sound for any N and M from 2 on, but biased upwards, the more so the fewer samples: compare figures of equal N
    and M alone, and read little into them below F samples.

    Raises:
        EvaluationError: fewer than two samples, numbers of features that differ, or values that are not finite.
    """
    a, b = features_a.double(), features_b.double()
    _check_features(a, b)
    return _distance(a.mean(dim=0), _root_of_samples(a), b.mean(dim=0), _root_of_samples(b))


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """:func:`frechet_distance` of sets of which only the moments are kept.

    Raises:
        EvaluationError: numbers of features that differ, or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(f"moments of {len(a.mean)} and {len(b.mean)} features: not of one network")
    for moments in (a, b):
        if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.covariance).all()):
            raise EvaluationError("features are not finite: the images or the network's weights are damaged")
    return _distance(a.mean, _root_of_covariance(a.covariance), b.mean, _root_of_covariance(b.covariance))


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    """Of means ``[F]`` and roots ``L [R, F]`` of the covariances, ``S = L^T L``."""
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float((mean_a - mean_b).square().sum() + spread))


def _root_of_samples(x: Tensor) -> Tensor:
    """``L [min(N, F), F]`` from samples ``[N, F]``: no product squares their condition."""
    centred = (x - x.mean(dim=0)) / (len(x) - 1) ** 0.5
    root: Tensor = torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred
    return root


def _root_of_covariance(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Below this an eigenvalue is rounding; its root would not be small.
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    kept = values > floor
    root: Tensor = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return root


def _check_count(count: int) -> None:
    if count < 2:
        raise EvaluationError(f"a Fréchet distance needs at least 2 samples a set, not {count}; the more the better")


def _check_features(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise EvaluationError(f"features of shapes {list(a.shape)} and {list(b.shape)}: expected [N, F] and [M, F]")
    for features in (a, b):
        _check_count(len(features))
        if not bool(torch.isfinite(features).all()):
            raise EvaluationError("features are not finite: the images or the network's weights are damaged")
