"""The Fréchet distance, and the moments of the photos."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import PixelNetwork
from synthetic_run import CLASSES, PER_CLASS, make_config, write_photos
from torch import Tensor

from train.data import ImageDataset, to_unit
from train.evaluation import reference as module
from train.evaluation.figures import Moments, RunningMoments, frechet_distance
from train.evaluation.networks import EvaluationError
from train.evaluation.reference import measure_photos, published_reference, read_reference, reference, write_reference
from train.run import Run


def samples(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features: Tensor, batch: int = 7) -> Moments:
    running = RunningMoments()
    for part in features.split(batch):
        running.add(part)
    return running.result()


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(moments(a), moments(b))


def normal(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(1000, mean.double(), covariance.double())


@given(seed=st.integers(0, 99), count=st.integers(2, 40), width=st.integers(1, 20))
def test_a_set_is_at_no_distance_from_itself(seed: int, count: int, width: int) -> None:
    x = samples(seed, count, width)
    assert distance(x, x) == pytest.approx(0, abs=1e-9 * width)
    assert distance(x, x[torch.randperm(count)]) == pytest.approx(0, abs=1e-9 * width)


@given(seed=st.integers(0, 99), count=st.integers(2, 40), width=st.integers(1, 20), shift=st.floats(-5, 5))
def test_a_shift_costs_its_square(seed: int, count: int, width: int, shift: float) -> None:
    x = samples(seed, count, width)
    assert distance(x, x + shift) == pytest.approx(width * shift**2, abs=1e-10)


@given(seed=st.integers(0, 99), m=st.integers(2, 30), n=st.integers(2, 30), width=st.integers(1, 20))
def test_it_is_symmetric(seed: int, m: int, n: int, width: int) -> None:
    a, b = samples(seed, m, width), samples(seed + 1, n, width) * 1.5 + 0.3
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6, abs=1e-6)


def test_commuting_covariances_compare_standard_deviations() -> None:
    va, vb = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 9.0, 16.0])
    turn = torch.linalg.qr(samples(3, 4, 4)).Q
    a = normal(torch.zeros(4), turn @ va.double().diag() @ turn.T)
    b = normal(torch.ones(4), turn @ vb.double().diag() @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(4 + 1 + 1 + 0 + 16, rel=1e-9)


def test_flat_sets_in_orthogonal_planes_share_nothing() -> None:
    a, b = torch.zeros(3, 6), torch.zeros(3, 6)
    a[:, 0], b[:, 5] = torch.tensor([-1.0, 0, 1]), torch.tensor([-2.0, 0, 2])
    assert distance(a, b) == pytest.approx(1 + 4)


def test_moments_of_batches_are_those_of_the_whole() -> None:
    x = samples(0, 100, 6) + 1e6  # a naive sum of squares would lose the variance
    whole = moments(x, batch=13)
    assert whole.count == 100
    torch.testing.assert_close(whole.mean, x.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)


def test_too_few_samples_are_said() -> None:
    with pytest.raises(EvaluationError, match="at least 2 samples"):
        moments(torch.zeros(1, 3))


def test_features_that_cannot_be_compared_are_said() -> None:
    with pytest.raises(EvaluationError, match="not finite"):
        distance(torch.full((4, 3), math.nan), torch.zeros(4, 3))
    with pytest.raises(EvaluationError, match="not of one network"):
        frechet_distance(moments(samples(0, 9, 3)), moments(samples(0, 9, 2)))
    broken = normal(torch.zeros(2), torch.full((2, 2), math.inf))
    with pytest.raises(EvaluationError, match="not finite"):
        frechet_distance(broken, broken)


def test_moments_and_gallery_are_those_of_the_centre_crops(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    found = reference(Run(config), PixelNetwork())
    photos = to_unit(Run(config).photos().images[:])
    features = PixelNetwork()(photos)
    assert found.pool.count == len(photos) == CLASSES * PER_CLASS
    torch.testing.assert_close(found.pool.mean, features.pool.double().mean(dim=0))
    torch.testing.assert_close(found.pool.covariance, torch.cov(features.pool.double().T))
    torch.testing.assert_close(found.gallery.features, features.pool)
    assert found.gallery.labels.tolist() == sorted([*range(CLASSES)] * PER_CLASS)
    assert found.spatial is None


def test_it_is_read_from_the_run_folder_the_second_time(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = reference(Run(config), PixelNetwork(spatial=True))
    network = PixelNetwork(spatial=True)
    again = reference(Run(config), network)
    assert network.calls == 0
    assert first.spatial is not None
    assert again.spatial is not None
    for name in ("mean", "covariance"):
        assert torch.equal(getattr(again.pool, name), getattr(first.pool, name))
        assert torch.equal(getattr(again.spatial, name), getattr(first.spatial, name))
    assert torch.equal(again.gallery.top5, first.gallery.top5)


def test_other_photos_or_another_network_make_it_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first, other = (reference(Run(config), PixelNetwork(side=side)) for side in (4, 2))
    assert first.pool.mean.shape != other.pool.mean.shape
    write_photos(tmp_path / "photos", per_class=3)
    network = PixelNetwork(side=2)
    found = reference(Run(config), network)
    assert network.calls > 0
    assert found.pool.count == 3 * CLASSES


def test_a_large_gallery_is_a_random_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GALLERY_PHOTOS", 50)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    found = measure_photos(ImageDataset(images, torch.arange(200)), 120, PixelNetwork())
    assert found.pool.count == 120
    assert len(found.gallery.labels) == len(set(found.gallery.labels.tolist())) == 50
    assert found.gallery.labels.max() > 150  # not the first ones
    expected = PixelNetwork()(images[found.gallery.labels].float() / 127.5 - 1).pool
    torch.testing.assert_close(found.gallery.features, expected)


def test_a_damaged_file_is_not_read(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    path = tmp_path / "reference.npz"
    write_reference(path, measure_photos(ImageDataset(images, torch.arange(9)), 9, PixelNetwork()), "d")
    assert read_reference(path, "d") is not None
    assert read_reference(path, "e") is None
    path.write_bytes(path.read_bytes()[:-50])
    assert read_reference(path, "d") is None
    np.savez(path, digest=np.array("d"))
    assert read_reference(path, "d") is None


def test_adm_reference_batches_give_moments_and_photos(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {"mu": random.random(4), "sigma": np.eye(4), "mu_s": random.random(3), "sigma_s": np.eye(3),
              "arr_0": random.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)}  # fmt: skip
    np.savez(tmp_path / "adm.npz", **arrays)
    found = published_reference(tmp_path / "adm.npz", PixelNetwork(spatial=True))
    assert found.pool.mean.tolist() == arrays["mu"].tolist()
    assert found.spatial is not None
    assert found.spatial.mean.tolist() == arrays["mu_s"].tolist()
    photos = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found.gallery.features, PixelNetwork()(photos).pool)


@pytest.mark.parametrize("missing", ["mu", "sigma_s", "arr_0"])
def test_an_incomplete_reference_batch_is_refused(tmp_path: Path, missing: str) -> None:
    arrays = {key: np.zeros(1) for key in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if key != missing}
    np.savez(tmp_path / "adm.npz", **arrays)
    with pytest.raises(EvaluationError, match=r"evaluation\.reference .*adm\.npz"):
        published_reference(tmp_path / "adm.npz", PixelNetwork(spatial=True))
