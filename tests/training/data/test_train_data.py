"""One set of images from a folder, its zip and its npz; batches that depend on the seed and the step alone."""

import io
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from synthetic_run import CLASSES, PER_CLASS, write_photos

from train.data import BatchSource, DataError, ImageDataset, load_dataset, open_source


def zip_folder(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


def ramp(count: int = 7, side: int = 10) -> ImageDataset:
    """Image i is ``20 i`` plus a column ramp, so that mirrors can be told apart."""
    columns = torch.arange(side, dtype=torch.uint8).expand(count, 3, side, side)
    return ImageDataset(columns + 20 * torch.arange(count, dtype=torch.uint8)[:, None, None, None], torch.arange(count))


def source(dataset: ImageDataset, batch_size: int = 3, seed: int = 0, flip_probability: float = 0.5) -> BatchSource:
    return BatchSource(dataset, flip_probability, batch_size, seed)


def assert_same(first: ImageDataset, second: ImageDataset) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_folder_zip_and_npz_give_the_same_images(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    # A name that sorts differently as a path and as a string.
    (folder / "class_1").rename(folder / "class_0-a")
    files = sorted(folder.rglob("*.png"), key=lambda file: (file.parent.name, file.name))
    arrays = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    np.savez(tmp_path / "a.npz", arrays, labels)
    np.savez_compressed(tmp_path / "b.npz", images=arrays, labels=labels.astype(np.uint8))
    expected = load_dataset(folder, 10, CLASSES)
    assert expected.images.dtype == torch.uint8
    assert expected.images.shape == (CLASSES * PER_CLASS, 3, 10, 10)
    assert expected.labels.tolist() == labels.tolist()
    assert_same(expected, load_dataset(zip_folder(folder, tmp_path / "p.zip"), 10, CLASSES))
    assert_same(expected, load_dataset(zip_folder(folder, tmp_path / "q.zip", "top/train/"), 10, CLASSES))
    assert_same(expected, load_dataset(tmp_path / "a.npz", 10, CLASSES))
    assert_same(expected, load_dataset(tmp_path / "b.npz", 10, CLASSES))


def test_the_middle_of_the_long_side_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, 2:6] = 200
    np.savez(tmp_path / "wide.npz", pixels[None], np.zeros(1, dtype=np.int64))
    assert load_dataset(tmp_path / "wide.npz", 4, 1).images.unique().tolist() == [200]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    folder = write_photos(tmp_path / "photos", classes=1, per_class=1)
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("L", (9, 9), 255).convert(mode).save(folder / "class_0" / f"white.{suffix}")
    dataset = load_dataset(folder, 8, 1)
    white = dataset.images[1].float()
    assert white.shape == (3, 8, 8)
    assert white.min() > 250


def test_hidden_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    (folder / "class_0" / "notes.txt").write_text("not a photo")
    (folder / "class_0" / "._0.png").write_bytes(b"macOS keeps these beside the photos of a zip")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(b"of a file manager")
    (folder / "loose.png").write_bytes(b"in no class")
    assert len(load_dataset(folder, 8, CLASSES)) == CLASSES * PER_CLASS
    assert len(load_dataset(zip_folder(folder, tmp_path / "p.zip"), 8, CLASSES)) == CLASSES * PER_CLASS


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    bad = folder / "class_2" / "broken.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg: not a readable image") as caught:
        load_dataset(folder, 8, CLASSES)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"p\.zip:class_2/broken\.jpg: not a readable image"):
        load_dataset(zip_folder(folder, tmp_path / "p.zip"), 8, CLASSES)


@given(cut=st.floats(0, 1), flip=st.floats(0, 0.999))
def test_a_damaged_image_is_a_data_error_or_still_an_image(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flip: float
) -> None:
    whole = io.BytesIO()
    Image.effect_noise((16, 16), 80).save(whole, "PNG")
    content = bytearray(whole.getvalue()[: int(cut * len(whole.getvalue()))])
    if content:
        content[int(flip * len(content))] ^= 0x55
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "only").mkdir()
    (folder / "only" / "photo.png").write_bytes(content)
    raised = None
    try:
        assert len(load_dataset(folder, 8, 1)) == 1
    except DataError as error:
        raised = str(error)
    assert raised is None or "photo.png" in raised


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    path = zip_folder(write_photos(tmp_path / "photos"), tmp_path / "p.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"class_1/0.png") + 60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"class_1/0\.png: not a readable image"):
        load_dataset(path, 8, CLASSES)


def test_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "file.txt").write_text("text")
    for path, expected in (
        (empty, "holds no class folder"),
        (tmp_path / "empty.zip", "holds no class folder"),
        (tmp_path / "file.txt", "neither a folder, a zip, an npz nor a Parquet file"),
        (tmp_path / "absent", "does not exist"),
    ):
        with pytest.raises(DataError, match=expected) as caught:
            load_dataset(path, 8, 1)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("num_classes", [CLASSES - 1, CLASSES + 1])
def test_a_wrong_number_of_classes_is_named(tmp_path: Path, num_classes: int) -> None:
    folder = write_photos(tmp_path / "photos")
    with pytest.raises(DataError, match=f"has {CLASSES} classes .* but model.num_classes is {num_classes}") as caught:
        load_dataset(folder, 8, num_classes)
    assert str(folder) in str(caught.value)


IMAGES, LABELS = np.zeros((2, 9, 9, 3), dtype=np.uint8), np.zeros(2, dtype=np.int64)


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": IMAGES, "labels": LABELS},
        {"images": IMAGES},
        {"images": IMAGES.astype(np.float32), "labels": LABELS},
        {"images": IMAGES[0], "labels": LABELS},
        {"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS},
        {"images": IMAGES, "labels": LABELS[:1]},
        {"images": IMAGES, "labels": LABELS + 0.5},
        {"images": IMAGES, "labels": LABELS[:, None]},
        {"images": IMAGES, "labels": np.int64(0)},
        {"images": IMAGES, "labels": LABELS - 1},
        {"images": IMAGES, "labels": LABELS + 1},
        {"images": IMAGES[:0], "labels": LABELS[:0]},
        {"images": IMAGES[:, :0], "labels": LABELS},
        {"images": np.array([{}, {}]), "labels": LABELS},
    ],
    ids=lambda arrays: " ".join(f"{name} {array.dtype}{array.shape}" for name, array in arrays.items()),
)
def test_a_wrong_npz_is_named(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=r"wrong\.npz"):
        load_dataset(tmp_path / "wrong.npz", 8, 1)


def test_a_damaged_or_foreign_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    np.savez(path, IMAGES, LABELS)
    whole = path.read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    for content in (b"", b"text", whole[:-40], whole[:100], buffer.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.npz"):
            load_dataset(path, 8, 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch_size=st.integers(1, 11),
    steps=st.lists(st.integers(0, 400_000), min_size=1, max_size=4),
)
def test_a_batch_depends_on_seed_and_step_alone(seed: int, batch_size: int, steps: list[int]) -> None:
    dataset = ramp()
    used = source(dataset, batch_size, seed)
    first = [used.batch(step) for step in steps]
    for step, (images, labels) in reversed(list(zip(steps, first, strict=True))):
        for each in (used, source(dataset, batch_size, seed)):
            again_images, again_labels = each.batch(step)
            assert torch.equal(images, again_images)
            assert torch.equal(labels, again_labels)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9), batch_size=st.integers(1, 9), epoch=st.integers(0, 99))
def test_every_epoch_visits_every_image_once(seed: int, count: int, batch_size: int, epoch: int) -> None:
    batches = source(ramp(count), batch_size, seed)
    first = epoch * count
    steps = range(first // batch_size, -(-(first + count) // batch_size))
    seen = torch.cat([batches.batch(step)[1] for step in steps]).tolist()
    skipped = first - steps.start * batch_size
    assert sorted(seen[skipped : skipped + count]) == list(range(count))


@given(step=st.integers(0, 1000), flip=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_batch_is_the_images_themselves_some_mirrored(step: int, flip: float) -> None:
    dataset = ramp()
    images, labels = source(dataset, 5, flip_probability=flip).batch(step)
    whole = dataset.means(slice(None))[labels]
    mirrored = [torch.equal(image, each.flip(-1)) for image, each in zip(images, whole, strict=True)]
    assert all(
        torch.equal(image, each.flip(-1) if flipped else each)
        for image, each, flipped in zip(images, whole, mirrored, strict=True)
    )
    assert flip == 0.5 or all(mirrored) == any(mirrored) == bool(flip)


def test_both_mirrors_turn_up() -> None:
    dataset = ramp()
    images, labels = source(dataset, 20).batch(0)
    assert {bool(image[0, 0, 0] > image[0, 0, -1]) for image in images} == {True, False}
    assert images.min() >= -1
    assert images.max() <= 1
    assert len(labels.unique()) == 7


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: object) -> np.ndarray:
    """Pixel rows of the one image of ``folder``, as prepared at 8 px: ``[3, 8, 8]``."""
    (folder / "class").mkdir(parents=True)
    image.save(folder / "class" / name, **options)
    return load_dataset(folder, 8, 1).images[0].numpy()


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32768, 128), (65535, 255), (32600, 127)])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path, value: int, expected: int) -> None:
    image = Image.fromarray(np.full((8, 8), value, dtype=np.uint16))
    assert set(saved(tmp_path / "data", image).flat) == {expected}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_not_their_hidden_colour(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 4, 8))
    options: dict[str, object] = {}
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([200, 0, 0, 10, 20, 30])
        palette.paste(0, (0, 0, 4, 8))
        image, options = palette, {"transparency": 0}
    pixels = saved(tmp_path / "data", image.convert(mode), **options)
    assert set(pixels[:, :, :4].flat) == {255}
    assert pixels[:, :, 4:].max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_as_their_exif_says(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = tmp_path / "stored.png"
    # What a camera stores is turned so that a viewer that follows the tag shows ``upright``: the inverse transform.
    for inverse in range(1, 9):
        turned = Image.Exif()
        turned[0x0112] = inverse
        upright.save(stored, exif=turned)
        camera = ImageOps.exif_transpose(Image.open(stored))
        camera.save(stored, exif=exif)
        if np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(stored))), np.asarray(upright)):
            break
    pixels = saved(tmp_path / "data", camera, exif=exif)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(upright))


def split_folder(root: Path) -> Path:
    write_photos(root / "train", classes=2, per_class=3)
    write_photos(root / "val", classes=2, per_class=1)
    return root


@pytest.mark.parametrize("num_classes", [0, 2])
def test_train_and_val_are_told_apart(tmp_path: Path, num_classes: int) -> None:
    folder = split_folder(tmp_path / "photos")
    for path in (folder, zip_folder(folder, tmp_path / "p.zip"), zip_folder(folder, tmp_path / "q.zip", "top/")):
        assert len(load_dataset(path, 8, num_classes)) == 6
        assert len(load_dataset(path, 8, num_classes, split="val")) == 2
        with pytest.raises(DataError, match="split test"):
            load_dataset(path, 8, num_classes, split="test")


def test_splits_without_a_training_part_are_named(tmp_path: Path) -> None:
    folder = split_folder(tmp_path / "photos")
    (folder / "train").rename(folder / "test")
    for path in (folder, zip_folder(folder, tmp_path / "p.zip")):
        with pytest.raises(DataError, match=r"test/, val/"):
            load_dataset(path, 8, 2)


def test_class_names_are_composed_unicode(tmp_path: Path) -> None:
    """Decomposed, the second name would come first."""
    for name in ("Zebra", unicodedata.normalize("NFD", "Ähre")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "a.png")
    assert "Zebra" in open_source(tmp_path / "data", 2).name(0)


def test_adm_crop_halves_then_resizes(tmp_path: Path) -> None:
    """A 40 x 36 image to 8 px: two box halvings to 10 x 9, bicubic to 9 x 8, and the middle 8 columns."""
    noise = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", noise[None], np.zeros(1, dtype=np.int64))
    quarter = noise.reshape(18, 2, 20, 2, 3).mean(axis=(1, 3))
    quarter = np.floor(np.floor(quarter + 0.5).reshape(9, 2, 10, 2, 3).mean(axis=(1, 3)) + 0.5).astype(np.uint8)
    expected = np.asarray(Image.fromarray(quarter).resize((9, 8), Image.Resampling.BICUBIC))[:, :8]
    found = load_dataset(tmp_path / "a.npz", 8, 1, fit="adm").images[0].numpy().transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2  # how each pass rounds halves
    other = load_dataset(tmp_path / "a.npz", 8, 1).images[0].numpy().transpose(1, 2, 0)
    assert np.abs(other.astype(int) - expected.astype(int)).max() > 10
