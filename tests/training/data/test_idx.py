"""IDX folders, as MNIST and Fashion-MNIST ship: read whole, or one line says which file is at fault."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_run import idx_bytes, write_idx

from train.data import DataError, load_dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 5), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2], dtype=np.uint8)


def zipped(data: bytes, level: int = 1) -> bytes:
    """Without the time of day: the bytes are part of tests' names."""
    return gzip.compress(data, level, mtime=0)


def write(folder: Path, prefix: str = "train", images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> Path:
    return write_idx(folder, prefix, images, labels)


def test_grey_images_become_rgb_in_their_order(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "idx"), 5, 3)
    assert dataset.images.dtype == torch.uint8
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES)[:, None].expand(6, 3, 5, 5))
    assert dataset.labels.tolist() == LABELS.tolist()


def test_a_split_is_picked_and_gzip_is_optional(tmp_path: Path) -> None:
    folder = write(write(tmp_path / "idx"), "t10k", 255 - IMAGES, LABELS[::-1].copy())
    for packed in folder.glob("t10k-*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    dataset = load_dataset(folder, 5, 3, split="test")
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(255 - IMAGES))
    assert dataset.labels.tolist() == LABELS[::-1].tolist()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train-images-idx3-ubyte.gz", None, "lacks train-images-idx3-ubyte"),
        ("train-labels-idx1-ubyte.gz", None, "lacks train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", b"text", "images-idx3-ubyte.gz: not a readable gzip file"),
        ("train-images-idx3-ubyte.gz", zipped(idx_bytes(IMAGES))[:40], "not a readable gzip file"),
        ("train-images-idx3-ubyte.gz", zipped(idx_bytes(LABELS)), "not an IDX file .* in 3 dimension"),
        ("train-images-idx3-ubyte.gz", zipped(b""), "not an IDX file"),
        (
            "train-images-idx3-ubyte.gz",
            zipped(idx_bytes(IMAGES)[:-1]),
            "149 bytes where its header says 6x5x5",
        ),
        ("train-labels-idx1-ubyte.gz", zipped(idx_bytes(LABELS[:5])), "6 images but 5 labels"),
        ("train-images-idx3-ubyte.gz", zipped(idx_bytes(IMAGES[:0])), "0 images but 6 labels"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    folder = write(write(tmp_path / "idx"), "t10k")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        load_dataset(folder, 5, 3)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_wrong_number_of_classes_is_named(tmp_path: Path, num_classes: int) -> None:
    with pytest.raises(DataError, match=f"has 3 classes .* but model.num_classes is {num_classes}"):
        load_dataset(write(tmp_path / "idx"), 5, num_classes)
