"""Prepared data are the data, whole, mapped and made once; whatever went wrong, the next call goes on or says why."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from several_processes import start
from synthetic_run import CLASSES, PER_CLASS, make_config, write_config, write_photos

from train.config import TrainConfig
from train.data import (
    BatchSource,
    DataError,
    ImageDataset,
    ShardedTensor,
    data_digest,
    data_folder,
    load_dataset,
    open_dataset,
    preparation,
    prepare,
    read_index,
    shards,
)
from train.evaluation.networks import EvaluationError
from train.evaluation.run import evaluate_run
from train.run import Run
from train.state import StateError, locked

COUNT = CLASSES * PER_CLASS
SIDE = 8  # of synthetic_run's model.input_size


@pytest.fixture(scope="module", autouse=True)
def three_a_shard() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 3 * 3 * SIDE * SIDE)
        yield


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the images that are decoded."""
    seen: list[int] = []
    read = preparation.read_square

    def watched(source: Any, index: int, *rest: Any) -> np.ndarray:
        seen.append(index)
        return read(source, index, *rest)

    monkeypatch.setattr(preparation, "read_square", watched)
    return seen


def notes_of(config: TrainConfig) -> list[str]:
    notes: list[str] = []
    prepare(config, notes.append)
    return notes


def files_of(config: TrainConfig) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in data_folder(config).iterdir()}


def prepared(config: TrainConfig) -> ImageDataset:
    dataset = open_dataset(config, prepare(config, lambda _: None))
    assert isinstance(dataset, ImageDataset)
    return dataset


def test_shards_hold_the_images_and_map_them(config: TrainConfig) -> None:
    expected = load_dataset(config.data.path, SIDE, CLASSES)
    dataset = prepared(config)
    assert isinstance(dataset.images, ShardedTensor)
    assert all(isinstance(each, np.memmap) for each in dataset.images._maps)
    assert [len(each) for each in dataset.images._maps] == [3, 3, 2]
    assert dataset.images.shape == expected.images.shape
    assert torch.equal(dataset.images[:], expected.images)
    assert torch.equal(dataset.labels, expected.labels)
    index = read_index(data_folder(config))
    assert index is not None
    assert (index.count, index.classes, index.kind, index.dtype) == (COUNT, CLASSES, "images", "uint8")
    assert index.digests == {"data": data_digest(config.data.path)}
    assert "progress.json" not in files_of(config)


@given(data=st.data())
def test_rows_of_shards_are_rows_of_their_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    whole = torch.arange(sum(sizes) * 6).reshape(-1, 2, 3)
    folder = tmp_path_factory.mktemp("rows")
    paths = []
    for i, part in enumerate(torch.split(whole, sizes)):
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], part.numpy())
    rows = ShardedTensor(paths)
    index = data.draw(st.integers(0, len(whole) - 1))
    assert torch.equal(rows[index], whole[index])
    assert torch.equal(rows[index : index + 5], whole[index : index + 5])
    picked = data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5))
    assert torch.equal(rows[torch.tensor(picked)], whole[picked])
    with pytest.raises(IndexError):
        rows[len(whole)]


def test_prepared_data_are_left_alone(config: TrainConfig, reads: list[int]) -> None:
    assert notes_of(config) == ["prepare: 8 images of 4 classes in 3 shards"]
    files = files_of(config)
    reads.clear()
    assert notes_of(config) == []
    assert (reads, files_of(config)) == ([], files)


def test_times_alone_make_nothing_new(config: TrainConfig, reads: list[int]) -> None:
    notes_of(config)
    reads.clear()
    os.utime(config.data.path / "class_0" / "0.png", (1, 1))
    assert notes_of(config) == []
    assert reads == []
    index = read_index(data_folder(config))
    assert index is not None
    assert index.fingerprint == shards.fingerprint(config.data.path)


def test_a_changed_image_makes_them_anew(config: TrainConfig) -> None:
    before = prepared(config).images[0]
    pixels = np.asarray(Image.open(config.data.path / "class_0" / "0.png"))
    Image.fromarray(255 - pixels).save(config.data.path / "class_0" / "0.png")
    assert notes_of(config)[0] == "prepare: made again, as data.path has other content"
    assert not torch.equal(prepared(config).images[0], before)
    assert torch.equal(prepared(config).images[:], load_dataset(config.data.path, SIDE, CLASSES).images)


def test_another_size_makes_them_anew(config: TrainConfig, tmp_path: Path) -> None:
    notes_of(config)
    larger = make_config(tmp_path, {"model": {"input_size": 12}})
    assert notes_of(larger)[0] == "prepare: made again, as size 8 is now 12"
    assert prepared(larger).images.shape == (COUNT, 3, 12, 12)


def test_another_number_of_classes_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    notes_of(config)
    files = files_of(config)
    with pytest.raises(DataError, match=r"has 4 classes .* but model\.num_classes is 5"):
        prepare(make_config(tmp_path, {"model": {"num_classes": 5}}), lambda _: None)
    assert files_of(config) == files


class Crash(Exception):
    """What no handler expects."""


@pytest.mark.parametrize("at", range(1, COUNT))
def test_a_crash_is_gone_on_from(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    read = preparation.read_square

    def crashing(source: Any, index: int, *rest: Any) -> np.ndarray:
        if index == at:
            raise Crash
        return read(source, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "read_square", crashing)
        with pytest.raises(Crash):
            prepare(config, lambda _: None)
    assert read_index(data_folder(config)) is None
    kept = at // 3 * 3
    notes = notes_of(config)
    assert (f"prepare: continues after {kept} of {COUNT} samples" in notes) == (kept > 0)
    assert torch.equal(prepared(config).images[:], load_dataset(config.data.path, SIDE, CLASSES).images)


def test_half_of_other_data_is_not_gone_on_from(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_save", failing(shards._save, after=1))
        with pytest.raises(DataError):
            prepare(config, lambda _: None)
    shutil.rmtree(config.data.path)
    random = np.random.default_rng(5)
    for c in range(CLASSES):
        (config.data.path / f"c{c}").mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(config.data.path / f"c{c}" / "a.png")
    assert notes_of(config) == ["prepare: 4 images of 4 classes in 2 shards"]
    assert torch.equal(prepared(config).images[:], load_dataset(config.data.path, SIDE, CLASSES).images)


def failing(save: Callable[..., Any], after: int) -> Callable[..., Any]:
    """``save``, but the disk is full from the call after ``after``."""
    calls = iter(range(1000))

    def wrapper(path: Path, array: np.ndarray) -> Any:
        if next(calls) >= after:
            raise shards._no_room(path, OSError(errno.ENOSPC, "No space left on device"))
        return save(path, array)

    return wrapper


def test_a_full_disk_keeps_what_is_finished(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stream: Any, array: np.ndarray, **rest: Any) -> None:
        if array.ndim == 4 and array[0, 0, 0, 0] == images[3, 0, 0, 0] and len(array) == 3:
            stream.write(b"half a sh")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, array, **rest)

    images, write = load_dataset(config.data.path, SIDE, CLASSES).images.numpy(), np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(
            DataError, match=r"00001\.npy: cannot be written \(.*No space left.*\); free some space"
        ) as e:
            prepare(config, lambda _: None)
    assert "\n" not in str(e.value)
    assert sorted(files_of(config)) == ["00000.json", "00000.npy", "progress.json"]
    assert notes_of(config)[0] == "prepare: continues after 3 of 8 samples"
    assert torch.equal(prepared(config).images[:], torch.from_numpy(images))


def test_too_small_a_disk_is_said_before_anything_is_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"need 0\.0 GB more, but .* has 0\.0 GB free"):
        prepare(config, lambda _: None)
    assert reads == [0]


def test_an_unreadable_image_is_named_and_can_be_replaced(config: TrainConfig) -> None:
    bad = config.data.path / "class_2" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"class_2/1\.png: not a readable image .*; remove it or replace it") as caught:
        prepare(config, lambda _: None)
    assert "\n" not in str(caught.value)
    assert read_index(data_folder(config)) is None
    bad.write_bytes(whole)
    assert torch.equal(prepared(config).images[:], load_dataset(config.data.path, SIDE, CLASSES).images)


@pytest.mark.parametrize("spoil", ["empty", "absent", "first"])
def test_data_of_no_use_leave_no_folder(config: TrainConfig, spoil: str) -> None:
    if spoil == "first":
        (config.data.path / "class_0" / "0.png").write_bytes(b"no image")
    else:
        shutil.rmtree(config.data.path)
    if spoil == "empty":
        config.data.path.mkdir()
    with pytest.raises(DataError, match=re.escape(str(config.data.path))):
        prepare(config, lambda _: None)
    assert not config.run_dir.exists()


@pytest.mark.parametrize("name", ["00001.npy", "labels.npy"])
def test_a_missing_or_cut_file_is_named(config: TrainConfig, name: str) -> None:
    index = prepare(config, lambda _: None)
    path = data_folder(config) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}: missing or not the \d+ bytes .* delete that folder and run again"):
        open_dataset(config, index)
    path.unlink()
    with pytest.raises(DataError, match=name):
        open_dataset(config, index)


def test_a_damaged_index_is_named(config: TrainConfig) -> None:
    prepare(config, lambda _: None)
    (data_folder(config) / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json: not a readable index .* delete that folder"):
        prepare(config, lambda _: None)


def test_two_processes_do_not_prepare_one_folder(config: TrainConfig) -> None:
    with locked(config.run_dir / "data.pt"), pytest.raises(StateError, match="another process"):
        prepare(config, lambda _: None)


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6), world=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_shares_of_a_batch_make_up_the_batch(seed: int, step: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 8, 8), generator=generator, dtype=torch.uint8)
    source = BatchSource(ImageDataset(images, torch.arange(7)), 0.5, 12, seed)
    images, labels = source.batch(step)
    shares = [source.batch(step, rank, world) for rank in range(world)]
    assert all(len(share[1]) == 12 // world for share in shares)
    assert torch.equal(torch.cat([share[0] for share in shares]), images)
    assert torch.equal(torch.cat([share[1] for share in shares]), labels)


def test_some_images_are_always_the_same_ones(config: TrainConfig) -> None:
    whole, some, again = (Run(config).photos(count) for count in (None, 5, 5))
    assert torch.equal(some.images[:], again.images[:])
    assert len(some) == 5
    rows = [i for i in range(COUNT) if any(torch.equal(whole.images[i], image) for image in some.images[:])]
    assert some.labels.tolist() == whole.labels[rows].tolist()


def test_a_run_walks_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, {"evaluation": {"split": "val"}})
    folder = config.data.path
    shutil.copytree(folder, folder / "train")
    shutil.copytree(folder / "train", folder / "val")
    walks: list[Path] = []
    walk = shards._files
    Run(config).held_out.prepare()
    Run(config).prepare()
    monkeypatch.setattr(shards, "_files", lambda folder: walks.append(folder) or walk(folder))
    run = Run(config)
    for _ in range(2):
        run.prepare()
        run.held_out.prepare()
    assert len(run.held_out.photos()) == COUNT
    assert walks == [folder]
    (folder / "val" / "class_0" / "new.png").write_bytes((folder / "class_0" / "0.png").read_bytes())
    assert Run(config).held_out.index.count == COUNT + 1


SMALL_SHARDS = "from train.data import shards; shards.SHARD_BYTES = 3 * 192; from train.cli import app; app()"


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    Image.new("RGBA", (12, 14), (9, 9, 9, 0)).save(photos / "class_3" / "0.png")
    one, two = (write_config(tmp_path, {"run_dir": str(tmp_path / name)}, f"{name}.yaml") for name in ("one", "two"))
    outs = []
    for path, world in ((one, 1), (two, 2)):
        processes = start("-c", SMALL_SHARDS, "prepare", "-c", str(path), world=world)
        said = [process.communicate(timeout=600)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * world
        outs.append("".join(said))
    files = [{f.name: f.read_bytes() for f in (tmp_path / name / "data").iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert sum(name.endswith(".npy") for name in files[0]) == 4  # three shards and the labels
    said = "images with transparency were composited on white, such as .*class_3/0.png"
    assert [bool(re.search(said, out)) for out in outs] == [True, True]


def write_features(folder: Path, count: int = 6, side: int = 8) -> np.ndarray:
    """Latents as fast-DiT extracts them, beside the settings of an autoencoder that halves an image once."""
    latents = np.random.default_rng(0).normal(size=(count, 1, 4, side, side)).astype(np.float32)
    for name in ("imagenet16_features", "imagenet16_labels", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "vae" / "config.json").write_text('{"block_out_channels": [4, 4]}')
    for i, latent in enumerate(latents):
        np.save(folder / "imagenet16_features" / f"{i}.npy", latent)
        np.save(folder / "imagenet16_labels" / f"{i}.npy", np.array([i % CLASSES]))
    return latents[:, 0]


def features_config(root: Path) -> TrainConfig:
    data = {"path": str(root / "features"), "vae": str(root / "features" / "vae")}
    return make_config(root, {"data": data, "model": {"in_channels": 4}})


def test_features_of_fast_dit_are_drawn_as_they_are(tmp_path: Path) -> None:
    latents = write_features(tmp_path / "features")
    config = features_config(tmp_path)
    assert config.data.flip_probability > 0
    dataset = open_dataset(config, prepare(config, lambda _: None))
    x0, labels = BatchSource(dataset, 0.5, 6, seed=0).batch(0)
    order = [int(np.abs(latents - each.numpy()).max(axis=(1, 2, 3)).argmin()) for each in x0]
    assert sorted(order) == list(range(6))
    np.testing.assert_allclose(x0.numpy(), latents[order], rtol=2**-10, atol=1e-6)
    assert labels.tolist() == [i % CLASSES for i in order]
    with pytest.raises(DataError, match=r"holds latents and no photos; set evaluation\.reference"):
        Run(config).photos(2)
    with pytest.raises(EvaluationError, match=r"no photos to compare with; set evaluation\.inception and"):
        evaluate_run(Run(config), "teacher")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "imagenet16_labels" / "3.npy").unlink(),
            r"imagenet16_labels/3\.npy: not a readable npy",
        ),
        (lambda folder: np.save(folder / "imagenet16_features" / "0.npy", np.zeros((4, 9, 9))), "not floats"),
        (lambda folder: np.save(folder / "imagenet16_labels" / "5.npy", np.array([9])), "labels 0..9"),
        (
            lambda folder: np.save(folder / "imagenet16_labels" / "5.npy", np.array(["a"], dtype=object)),
            "not a readable",
        ),
        (lambda folder: shutil.copytree(folder / "imagenet16_features", folder / "b_features"), "one NAME_features"),
        (lambda folder: shutil.rmtree(folder / "imagenet16_labels"), "without imagenet16_labels"),
    ],
)
def test_features_of_no_use_are_named(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_features(tmp_path / "features")
    spoil(tmp_path / "features")
    with pytest.raises(DataError, match=message):
        prepare(features_config(tmp_path), lambda _: None)
