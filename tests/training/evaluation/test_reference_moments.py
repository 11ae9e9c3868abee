"""The reference is that of all photos, is kept, and is made again when anything it is of changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import PixelNetwork
from synthetic_run import CLASSES, PER_CLASS, make_config, write_photos

from train.data import ImageDataset, centre_images, read_images
from train.evaluation import reference as module
from train.evaluation.errors import EvaluationError
from train.evaluation.reference import measure_photos, published_reference, read_reference, reference, write_reference


def test_moments_and_gallery_are_those_of_the_centre_crops(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    found = reference(config, PixelNetwork())
    photos = centre_images(read_images(config), config.model.input_size)
    features = PixelNetwork()(photos)
    assert found.pool.count == len(photos) == CLASSES * PER_CLASS
    torch.testing.assert_close(found.pool.mean, features.pool.double().mean(dim=0))
    torch.testing.assert_close(found.pool.covariance, torch.cov(features.pool.double().T))
    torch.testing.assert_close(found.gallery.features, features.pool)
    assert found.gallery.labels.tolist() == sorted([*range(CLASSES)] * PER_CLASS)
    assert found.spatial is None


def test_it_is_read_from_the_run_folder_the_second_time(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = reference(config, PixelNetwork(spatial=True))
    network = PixelNetwork(spatial=True)
    again = reference(config, network)
    assert network.calls == 0
    assert again.digest == first.digest
    assert first.spatial is not None
    assert again.spatial is not None
    for name in ("mean", "covariance"):
        assert torch.equal(getattr(again.pool, name), getattr(first.pool, name))
        assert torch.equal(getattr(again.spatial, name), getattr(first.spatial, name))
    assert torch.equal(again.gallery.top5, first.gallery.top5)


def test_other_photos_or_another_network_make_it_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    digests = {reference(config, PixelNetwork()).digest, reference(config, PixelNetwork(side=2)).digest}
    write_photos(tmp_path / "photos", per_class=3)
    network = PixelNetwork(side=2)
    found = reference(config, network)
    assert network.calls > 0
    assert found.pool.count == 3 * CLASSES
    assert len(digests | {found.digest}) == 3


def test_a_large_gallery_is_a_random_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GALLERY_PHOTOS", 50)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    found = measure_photos(ImageDataset(images, torch.arange(200)), 120, 8, PixelNetwork(), "d")
    assert found.pool.count == 120
    assert len(found.gallery.labels) == len(set(found.gallery.labels.tolist())) == 50
    assert found.gallery.labels.max() > 150  # not the first ones
    expected = PixelNetwork()(images[found.gallery.labels].float() / 127.5 - 1).pool
    torch.testing.assert_close(found.gallery.features, expected)


def test_a_damaged_file_is_not_read(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    path = tmp_path / "reference.npz"
    write_reference(path, measure_photos(ImageDataset(images, torch.arange(9)), 9, 8, PixelNetwork(), "d"))
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
