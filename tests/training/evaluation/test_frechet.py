"""The distance against closed forms: shifted, scaled and singular normals, and the scalar formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train.evaluation.errors import EvaluationError
from train.evaluation.frechet import Moments, RunningMoments, frechet_distance, frechet_distance_of_moments


def samples(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features: Tensor, batch: int = 7) -> Moments:
    running = RunningMoments()
    for part in features.split(batch):
        running.add(part)
    return running.result()


def normal(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(1000, mean.double(), covariance.double())


@given(seed=st.integers(0, 99), count=st.integers(2, 40), width=st.integers(1, 20))
def test_a_set_is_at_no_distance_from_itself(seed: int, count: int, width: int) -> None:
    x = samples(seed, count, width)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12 * width)
    assert frechet_distance(x, x[torch.randperm(count)]) == pytest.approx(0, abs=1e-12 * width)


@given(seed=st.integers(0, 99), count=st.integers(2, 40), width=st.integers(1, 20), shift=st.floats(-5, 5))
def test_a_shift_costs_its_square(seed: int, count: int, width: int, shift: float) -> None:
    x = samples(seed, count, width)
    assert frechet_distance(x, x + shift) == pytest.approx(width * shift**2, abs=1e-10)


@given(seed=st.integers(0, 99), count=st.integers(2, 40), width=st.integers(1, 20), scale=st.floats(0.1, 4))
def test_a_scale_costs_its_share_of_the_trace(seed: int, count: int, width: int, scale: float) -> None:
    x = samples(seed, count, width)
    x = x - x.mean(dim=0)
    trace = float(x.square().sum() / (count - 1))
    assert frechet_distance(x, scale * x) == pytest.approx((1 - scale) ** 2 * trace, abs=1e-10)


@given(seed=st.integers(0, 99), m=st.integers(2, 30), n=st.integers(2, 30), width=st.integers(1, 20))
def test_it_is_symmetric_and_the_moments_give_it_too(seed: int, m: int, n: int, width: int) -> None:
    a, b = samples(seed, m, width), samples(seed + 1, n, width) * 1.5 + 0.3
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert distance == pytest.approx(frechet_distance_of_moments(moments(a), moments(b)), rel=1e-6, abs=1e-6)


def test_one_feature_is_the_scalar_formula() -> None:
    a, b = samples(0, 50, 1), 3 * samples(1, 80, 1) - 2
    expected = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_commuting_covariances_compare_standard_deviations() -> None:
    va, vb = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 9.0, 16.0])
    turn = torch.linalg.qr(samples(3, 4, 4)).Q
    a = normal(torch.zeros(4), turn @ va.double().diag() @ turn.T)
    b = normal(torch.ones(4), turn @ vb.double().diag() @ turn.T)
    assert frechet_distance_of_moments(a, b) == pytest.approx(4 + 1 + 1 + 0 + 16, rel=1e-9)


def test_flat_sets_in_orthogonal_planes_share_nothing() -> None:
    a, b = torch.zeros(3, 6), torch.zeros(3, 6)
    a[:, 0], b[:, 5] = torch.tensor([-1.0, 0, 1]), torch.tensor([-2.0, 0, 2])
    assert frechet_distance(a, b) == pytest.approx(1 + 4)


def test_moments_of_batches_are_those_of_the_whole() -> None:
    x = samples(0, 100, 6) + 1e6  # a naive sum of squares would lose the variance
    whole = moments(x, batch=13)
    assert whole.count == 100
    torch.testing.assert_close(whole.mean, x.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)


def test_samples_of_two_normals_approach_the_distance_of_the_normals() -> None:
    a, b = samples(0, 20_000, 4), samples(1, 20_000, 4) * 2
    assert frechet_distance(a, b) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_said(count: int) -> None:
    with pytest.raises(EvaluationError, match="at least 2 samples"):
        frechet_distance(torch.zeros(count, 3), torch.zeros(5, 3))


def test_features_that_cannot_be_compared_are_said() -> None:
    with pytest.raises(EvaluationError, match=r"\[4, 3\] and \[4, 2\]"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(EvaluationError, match="not finite"):
        frechet_distance(torch.full((4, 3), math.nan), torch.zeros(4, 3))
    with pytest.raises(EvaluationError, match="not of one network"):
        frechet_distance_of_moments(moments(samples(0, 9, 3)), moments(samples(0, 9, 2)))
    broken = normal(torch.zeros(2), torch.full((2, 2), math.inf))
    with pytest.raises(EvaluationError, match="not finite"):
        frechet_distance_of_moments(broken, broken)
