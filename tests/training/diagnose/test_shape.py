"""Statistics against closed forms: normals, two-point and uniform tokens, and what does not depend on the stream."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robuq_core.quant.activation import SIGMA_PER_MEAN_ABS, fake_quantize_activation
from train.diagnose.watch import BITS, Shape, ShapeStatistics, normal_error


def shape_of(x: Tensor) -> Shape:
    statistics = ShapeStatistics()
    statistics.add(x)
    return statistics.result()


def normals(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def test_a_normal_is_found_normal_at_any_scale() -> None:
    found = shape_of(normals(200, 4608) * torch.logspace(-6, 6, 200)[:, None])
    assert found.tokens == 200
    assert found.values == 200 * 4608
    assert found.skew == pytest.approx(0, abs=0.01)
    assert found.kurtosis == pytest.approx(0, abs=0.02)
    assert found.ks < 0.003
    assert found.error == pytest.approx({bits: normal_error(bits) for bits in BITS}, rel=0.03)
    for normal, quantile in found.quantiles:
        if abs(normal) < 3:
            assert quantile == pytest.approx(normal, abs=0.05)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.36338), (2, 0.11885), (3, 0.03744), (4, 0.01154)])
def test_the_error_of_a_normal_is_the_published_one(bits: int, published: float) -> None:
    assert normal_error(bits) == pytest.approx(published, rel=0.005)


def test_tokens_of_two_values_have_the_least_kurtosis() -> None:
    found = shape_of(torch.tensor([[1.0, -1.0] * 50]))
    assert found.kurtosis == pytest.approx(-2)
    assert found.skew == pytest.approx(0)
    at = 1 / SIGMA_PER_MEAN_ABS  # all mass at +-0.798 of its sigma
    assert found.ks == pytest.approx(0.5 * (1 + math.erf(at / math.sqrt(2))) - 0.5, abs=2e-3)


def test_an_outlier_shows_in_kurtosis_and_distance() -> None:
    x = normals(50, 512)
    x[:, 7] = 80
    found = shape_of(x)
    assert found.kurtosis > 100
    assert found.skew > 5
    assert found.error[2] > shape_of(normals(50, 512)).error[2] * 2


def test_a_uniform_token_has_its_moments() -> None:
    found = shape_of(torch.linspace(-1, 1, 4001)[None])
    assert found.kurtosis == pytest.approx(-1.2, abs=0.01)
    # x / sigma is uniform on +-2 sqrt(2/pi): the distance to the normal is where the densities cross, or in closed form
    # from scanning the two distribution functions.
    end = 2 / SIGMA_PER_MEAN_ABS
    z = torch.linspace(-end, end, 20001, dtype=torch.float64)
    expected = float(((z + end) / (2 * end) - torch.special.ndtr(z)).abs().max())
    assert found.ks == pytest.approx(expected, abs=2e-3)


@given(cut=st.integers(1, 29), seed=st.integers(0, 99))
def test_the_stream_may_be_cut_anywhere(cut: int, seed: int) -> None:
    x = normals(30, 24, seed)
    parts = ShapeStatistics()
    parts.add(x[:cut])
    parts.add(x[cut:])
    found, whole = parts.result(), shape_of(x)
    assert found.density == whole.density
    assert (found.ks, found.quantiles) == (whole.ks, whole.quantiles)
    assert found.error == pytest.approx(whole.error)
    assert found.kurtosis == pytest.approx(whole.kurtosis)


@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS))
def test_the_error_is_that_of_the_quantiser(seed: int, bits: int) -> None:
    x = normals(5, 48, seed) ** 3
    lost = (x - fake_quantize_activation(x, bits)).square().sum(dim=1) / x.square().sum(dim=1)
    assert shape_of(x).error[bits] == pytest.approx(float(lost.mean()), rel=1e-5)


def test_density_and_edges_make_a_histogram() -> None:
    found = shape_of(normals(100, 256))
    assert len(found.edges) == len(found.density) + 1
    assert sum(found.density) * (found.edges[1] - found.edges[0]) == pytest.approx(1, abs=1e-4)


def test_tokens_of_zeros_are_left_out() -> None:
    x = normals(4, 32)
    padded = torch.cat([x, torch.zeros(3, 32)])
    assert shape_of(padded) == shape_of(x)
    with pytest.raises(ValueError, match="no token but zeros"):
        shape_of(torch.zeros(3, 32))
