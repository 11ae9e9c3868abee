"""Samples: balanced, seeded, kept on disk, in one picture."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stand_in import PixelNetwork
from tiny import write_tiny

from robuq_core.config import SamplerConfig
from robuq_core.pipeline import Sampler
from train.evaluation.networks import EvaluationError
from train.evaluation.samples import (
    SampleSet,
    as_unit,
    balanced_classes,
    first_seed,
    generate,
    generate_to_disk,
    random_classes,
    write_sheet,
)

STEPS = SamplerConfig(steps=2, guidance_scale=1.0)


@given(count=st.integers(1, 1000), num_classes=st.integers(1, 1000), seed=st.integers(0, 2**32 - 1))
def test_random_classes_are_distinct_and_of_their_seed(count: int, num_classes: int, seed: int) -> None:
    drawn = random_classes(count, num_classes, seed)
    assert drawn == random_classes(count, num_classes, seed)
    assert len(set(drawn)) == len(drawn) == min(count, num_classes)
    assert all(0 <= each < num_classes for each in drawn)


@given(count=st.integers(1, 300), num_classes=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_balanced_classes_are_as_even_as_can_be(count: int, num_classes: int, seed: int) -> None:
    drawn = balanced_classes(count, num_classes, seed)
    assert drawn == balanced_classes(count, num_classes, seed)
    counts = Counter(drawn)
    often = [counts.get(each, 0) for each in range(num_classes)]
    assert sum(often) == len(drawn) == count
    assert max(often) - min(often) <= 1


def test_sets_of_neighbouring_seeds_share_no_sample() -> None:
    starts = sorted(first_seed(seed) for seed in range(10))
    assert all(b - a > 100_000 for a, b in pairwise(starts))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_tiny(path)
    return Sampler.from_checkpoint(path)


def fill(sampler: Any, folder: Path, **changes: Any) -> SampleSet:
    settings = {"count": 10, "seed": 1, "batch_size": 4, "identity": "a", "settings": STEPS}
    return generate_to_disk(sampler, folder, **{**settings, **changes})


def test_samples_on_disk_are_those_of_their_seeds(sampler: Sampler, tmp_path: Path) -> None:
    samples = fill(sampler, tmp_path / "new" / "set")
    assert samples.images.shape == (10, 16, 16, 3)
    alone = generate(sampler, [int(samples.labels[7])], first_seed(1) + 7, STEPS)
    assert torch.equal(as_unit(samples.images[7:8]), alone)


class Killed(Exception):
    pass


class Mortal:
    """A sampler that is killed at its ``last`` call, and counts the samples it drew."""

    def __init__(self, sampler: Sampler, last: int | None = None) -> None:
        self.sampler, self.last, self.calls, self.drawn = sampler, last, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def generate(self, classes: list[int], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.last:
            raise Killed
        self.drawn += len(classes)
        return self.sampler.generate(classes, *args, **kwargs)


def test_a_killed_call_is_continued(sampler: Sampler, tmp_path: Path) -> None:
    whole = fill(sampler, tmp_path / "whole")
    with pytest.raises(Killed):
        fill(Mortal(sampler, last=2), tmp_path / "set")
    second = Mortal(sampler)
    resumed = fill(second, tmp_path / "set")
    assert second.drawn == 6
    assert torch.equal(resumed.images[:], whole.images[:])
    third = Mortal(sampler)
    assert torch.equal(fill(third, tmp_path / "set").images[:], whole.images[:])
    assert third.drawn == 0


def test_features_are_computed_once_and_are_those_of_the_samples(sampler: Sampler, tmp_path: Path) -> None:
    samples, network = fill(sampler, tmp_path), PixelNetwork(spatial=True)
    for _ in range(2):
        samples.store_features(network)
    assert network.calls == len(samples.files) == 3
    whole, parts = network(as_unit(samples.images[:])), list(samples.features(network))
    assert torch.equal(torch.cat([each.pool for each in parts]), whole.pool)
    assert torch.equal(torch.cat([each.spatial for each in parts if each.spatial is not None]), whole.spatial)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "b"},
        {"seed": 2},
        {"count": 9},
        {"batch_size": 5},
        {"settings": SamplerConfig(steps=3, guidance_scale=1.0)},
    ],
)
def test_samples_of_anything_else_are_replaced(sampler: Sampler, tmp_path: Path, change: dict[str, Any]) -> None:
    fill(sampler, tmp_path)
    watched = Mortal(sampler)
    samples = fill(watched, tmp_path, **change)
    assert watched.drawn == len(samples) == change.get("count", 10)


def test_a_damaged_description_starts_again(sampler: Sampler, tmp_path: Path) -> None:
    fill(sampler, tmp_path)
    (tmp_path / "about.json").write_text("[")
    watched = Mortal(sampler)
    fill(watched, tmp_path)
    assert watched.drawn == 10


def test_the_npz_has_the_layout_of_the_adm_evaluation(sampler: Sampler, tmp_path: Path) -> None:
    samples = fill(sampler, tmp_path / "set")
    samples.write_npz(tmp_path / "out" / "samples.npz")
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert (archive["arr_0"] == samples.images[:].numpy()).all()
        assert (archive["arr_1"] == samples.labels).all()


def test_a_folder_that_cannot_be_written_is_named(sampler: Sampler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="samples cannot be written"):
        fill(sampler, tmp_path / "file" / "set")


def test_a_full_disk_is_an_error_and_no_crash(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(EvaluationError, match="No space left"):
        fill(sampler, tmp_path)


def test_the_sheet_is_a_grid_of_samples_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    images = torch.rand(70, 3, 8, 8) * 2 - 1
    write_sheet(images, tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (8 * (96 + 2) + 2, 8 * (96 + 2) + 2, 3)  # 64 of 70
    bytes_of = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i in (0, 1, 8, 63):
        top, left = (2 + 98 * each for each in divmod(i, 8))
        assert (sheet[top : top + 96 : 12, left : left + 96 : 12] == bytes_of[i]).all()
    assert (sheet[:, [0, 1, 98, 99]] == 255).all()
