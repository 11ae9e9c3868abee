"""Parquet files of encoded images, as the Hub has them, give what a folder of the same images gives."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from train.data import DataError, load_dataset, open_source
from train.data import sources as module

COUNT = 11
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 9, 9, 3), dtype=np.uint8)
LABELS = [i % 3 for i in range(COUNT)]
NAMES = ["cat", "dog", "eel"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def table(rows: range, *, plain: bool = False, names: bool = True, label: str = "label") -> pa.Table:
    content = [encoded(PIXELS[i]) for i in rows]
    images = pa.array(content) if plain else pa.array([{"bytes": each, "path": None} for each in content], STRUCT)
    features = {"image": {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    columns = {"image": images, label: pa.array([LABELS[i] for i in rows], pa.int64())}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_hub(folder: Path) -> Path:
    """Two files of the train split, in small row groups, and one of another split."""
    folder.mkdir()
    parquet.write_table(table(range(6)), folder / "train-00000-of-00002.parquet", row_group_size=2)
    parquet.write_table(table(range(6, COUNT)), folder / "train-00001-of-00002.parquet", row_group_size=4)
    parquet.write_table(table(range(3)), folder / "test-00000-of-00001.parquet")
    return folder


def test_rows_come_in_order_over_files_and_groups(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "hub")
    dataset = load_dataset(folder, 9, 3)
    assert torch.equal(dataset.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert dataset.labels.tolist() == LABELS
    assert len(load_dataset(folder, 9, 3, split="test")) == 3


def test_a_lone_file_and_plain_bytes_will_do(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    parquet.write_table(table(range(COUNT), plain=True, names=False, label="fine"), path)
    source = open_source(path, 3)
    assert [np.array_equal(np.asarray(source.open(i)), PIXELS[i]) for i in (10, 0, 5)] == [True] * 3


def test_few_row_groups_are_in_memory(tmp_path: Path) -> None:
    images = module.ParquetImages(module.parquet_files(write_hub(tmp_path / "hub"), "train"))
    for i in range(COUNT):
        images.open(i)
        assert len(images._cache) <= 2


def test_an_unreadable_row_is_named(tmp_path: Path) -> None:
    rows = table(range(3)).to_pylist()
    rows[1]["image"]["bytes"] = b"no image"
    rows.append({"image": None, "label": 0})
    broken = pa.Table.from_pylist(rows, schema=table(range(1)).schema)
    parquet.write_table(broken, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1 of its row group 0: not a readable image"):
        load_dataset(tmp_path / "a.parquet", 9, 3)
    parquet.write_table(broken.take([0, 2, 3]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: .*not a readable image|b\.parquet.*classes"):
        load_dataset(tmp_path / "b.parquet", 9, 2)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": pa.array([0])}, "expected one column of images"),
        ({"image": pa.array([b""]), "label": pa.array(["cat"])}, "and an integer column label, not image: binary"),
        ({"a": pa.array([b""]), "b": pa.array([b""]), "label": pa.array([0])}, "expected one column of images"),
        ({"image": pa.array([b""]), "label": pa.array([None], pa.int64())}, "rows without a label"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "holds no image"),
    ],
)
def test_other_columns_are_named(tmp_path: Path, columns: dict[str, pa.Array], expected: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match=expected) as caught:
        load_dataset(tmp_path / "odd.parquet", 9, 1)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    parquet.write_table(table(range(3)), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: not a readable Parquet file"):
        load_dataset(path, 9, 3)
