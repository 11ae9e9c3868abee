"""Parquet files as image data sets on the Hugging Face Hub are laid out: a struct of encoded bytes, and a label."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.pictures import DataError, open_image
from train.logs import one_line

# Readers run a little apart from each other: at a boundary two groups are in use.
_GROUPS_KEPT = 2
_PREFIXES = {"train": ("train-",), "val": ("val-", "validation-"), "test": ("test-",)}


def parquet_files(path: Path, split: str) -> list[Path]:
    """``path`` itself, or the folder's files called ``SPLIT-*.parquet`` (``validation-`` for ``val``).

    Where no file is named after a split, all of them are ``train``.
    """
    files = [each for each in ([path] if path.is_file() else sorted(path.iterdir())) if each.suffix == ".parquet"]
    named = [file for file in files if file.name.startswith(_PREFIXES[split])]
    if named or split != "train":
        return named
    others = [file for file in files if file.name.startswith(_PREFIXES["val"] + _PREFIXES["test"])]
    if others and path.is_dir():
        raise DataError(f"data.path {path} holds {others[0].name} but no train-*.parquet; set data.split, or rename "
                        "the files that are the training data")  # fmt: skip
    return files


class ParquetImages:
    """The rows of ``files``, in order; :attr:`labels` int64 ``[N]``.

    Raises DataError if pyarrow is missing, or a file is unreadable or has no image and label column.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"{files[0]}: reading Parquet needs pyarrow ({error}); from a checkout: "
                            "pip install '.[train]'") from error  # fmt: skip
        self._groups: list[tuple[Path, Any, int]] = []  # path, open file, number of the row group in it
        self._starts: list[int] = []
        self._cache: dict[int, Any] = {}
        self._lock = threading.Lock()
        labels, rows = [], 0
        for path in files:
            try:
                file = parquet.ParquetFile(path)
                self._image, label = _columns(path, file.schema_arrow)
                labels.append(file.read(columns=[label]).column(0).to_numpy())
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors or OSErrors
                raise DataError(f"{path}: not a readable Parquet file ({one_line(error)}); fetch it again") from error
            if labels[-1].dtype.kind not in "iu":
                raise DataError(f"{path}: column {label} has rows without a label; remove them")
            for group in range(file.num_row_groups):
                self._groups.append((path, file, group))
                self._starts.append(rows)
                rows += file.metadata.row_group(group).num_rows
        if not rows:
            raise DataError(f"data.path {files[0].parent} holds no image")
        self.labels = np.concatenate(labels).astype(np.int64)

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        path, _, group = self._groups[number]
        return f"{path}: row {index - self._starts[number]} of its row group {group}"

    def open(self, index: int) -> Image.Image:
        number = bisect.bisect_right(self._starts, index) - 1
        content = self._column(number)[index - self._starts[number]].as_py()
        return open_image(content["bytes"] if isinstance(content, dict) else content)

    def _column(self, number: int) -> Any:
        with self._lock:
            if number not in self._cache:
                _, file, group = self._groups[number]
                self._cache[number] = file.read_row_group(group, columns=[self._image]).column(0)
                if len(self._cache) > _GROUPS_KEPT:
                    del self._cache[next(iter(self._cache))]
            return self._cache[number]


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """Names of the image and of the label column."""
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def holds_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_binary(field.type) for field in kind)
        return is_binary(kind)

    images = [field.name for field in schema if holds_image(field.type)]
    integers = [field.name for field in schema if types.is_integer(field.type)]
    labels = ["label"] if "label" in integers else integers
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(f"{path}: expected one column of images (bytes, or a struct with bytes) and an integer column "
                        f"label, not {found}")  # fmt: skip
    return images[0], labels[0]
