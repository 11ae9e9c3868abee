"""Prepared samples on disk: ``.npy`` shards and an index, written once and read through the page cache.

A shard is whole or absent, and the index is written last. Until then ``progress.json`` says what is being made, and
each finished shard has its own ``.json``, so that a run that was killed, or that met a full disk, makes the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.progress import Progress
from torch import Tensor

from robuq_core.files import replacing
from train import parallel
from train.data.pictures import DataError
from train.logs import one_line

SHARD_BYTES = 64 << 20
_REMEDY = "delete that folder and run again"


class Shard(BaseModel):
    """A file of ``count`` samples, with the SHA-256 of its bytes."""

    model_config = ConfigDict(frozen=True)  # keys of other versions are ignored

    file: str
    count: int
    bytes: int
    sha256: str


class Index(BaseModel):
    """What a folder of shards holds. ``made_with`` are the settings and ``digests`` the files it was made from.

    ``kind``: images uint8 ``[C, S, S]``, or latents float16 ``[mirrors, 2 C, S, S]``, means and then deviations.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    made_with: dict[str, Any]
    digests: dict[str, str]
    fingerprint: str
    count: int
    classes: int
    shape: tuple[int, ...]
    dtype: str
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    labels: Shard | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def sample_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class ShardedTensor:
    """Rows ``[N, ...]`` of many memory-mapped files as if of one tensor; what is read is all that is in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        # Copy on write: torch wants arrays that it may write to, and the files stay as they are.
        self._maps = [np.load(path, mmap_mode="c", allow_pickle=False) for path in paths]
        self._starts = [0, *accumulate(len(each) for each in self._maps)]
        self.shape = torch.Size((self._starts[-1], *self._maps[0].shape[1:]))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One row ``[...]``, or several ``[n, ...]``, copied."""
        if isinstance(index, int):
            return self._row(index)
        rows = range(*index.indices(self.shape[0])) if isinstance(index, slice) else index
        return torch.stack([self._row(int(i)) for i in rows])

    def _row(self, index: int) -> Tensor:
        shard = bisect_right(self._starts, index) - 1
        return torch.from_numpy(np.array(self._maps[shard][index - self._starts[shard]]))


def read_index(folder: Path) -> Index | None:
    """The index of ``folder``; none if nothing was finished there. Raises DataError if it is damaged."""
    path = folder / "index.json"
    try:
        return Index.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable index ({one_line(error)}); {_REMEDY}") from error


def open_shards(folder: Path, index: Index) -> tuple[ShardedTensor, Tensor]:
    """The samples, memory-mapped, and their labels int64 ``[N]``.

    Raises DataError if a file is missing or not of its size.
    """
    assert index.labels is not None
    for shard in (index.labels, *index.shards):
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise DataError(f"{path}: missing or not the {shard.bytes} bytes that index.json lists; {_REMEDY}")
    try:
        labels = torch.from_numpy(np.load(folder / index.labels.file, allow_pickle=False))
        return ShardedTensor([folder / shard.file for shard in index.shards]), labels
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: damaged ({one_line(error)}); {_REMEDY}") from error


def write_shards(
    folder: Path,
    index: Index,
    labels: np.ndarray,
    make: Callable[[range], np.ndarray],
    note: Callable[[str], None],
) -> Index:
    """Write ``make(range)`` of all of ``index.count`` samples, shard by shard; returns the finished index.

    All processes of a run call it together; each makes its share. What an earlier call with the same ``made_with`` and
    ``digests`` has finished is kept; anything else is removed. Raises DataError if the disk is too small or full.
    """
    per_shard = max(1, SHARD_BYTES // index.sample_bytes)
    shards = [range(first, min(first + per_shard, index.count)) for first in range(0, index.count, per_shard)]
    done = parallel.from_first(lambda: _begin(folder, index, shards, note))
    rank, world = parallel.sharing()
    mine = [number for number in range(len(shards)) if number not in done][rank::world]
    with Progress(disable=rank > 0) as progress:
        for number in progress.track(mine, description="preparing"):
            samples = make(shards[number])
            if samples.shape[1:] != index.shape or samples.dtype != index.dtype:
                raise ValueError(f"samples {samples.dtype} {samples.shape[1:]}, not {index.dtype} {index.shape}")
            write_json(folder / f"{number:05d}.json", _save(folder / f"{number:05d}.npy", samples))
    parallel.on_first(lambda: None)  # all have made their share
    return parallel.from_first(lambda: _finish(folder, index, shards, labels))


def _begin(folder: Path, index: Index, shards: Sequence[range], note: Callable[[str], None]) -> set[int]:
    """Numbers of the shards that an unfinished call for the same data and settings has left whole."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _unfinished(folder, index, shards)
    finished = sum(len(shards[number]) for number in done)
    if done:
        note(f"prepare: continues after {finished} of {index.count} samples")
    else:
        # The index first: a folder that is half emptied must not pass for a whole one.
        old = ("index.json", "progress.json", "labels.npy", "[0-9]*.npy", "[0-9]*.json", ".*.npy.*", ".*.json.*")
        for pattern in old:
            for file in folder.glob(pattern):
                file.unlink(missing_ok=True)
    needed, free = (index.count - finished) * index.sample_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"run_dir: the prepared data need {needed / 1e9:.1f} GB more, but {folder} has "
                        f"{free / 1e9:.1f} GB free; free some space or choose another run_dir")  # fmt: skip
    write_json(folder / "progress.json", index)
    return done


def _unfinished(folder: Path, index: Index, shards: Sequence[range]) -> set[int]:
    whole = set[int]()
    try:
        progress = Index.model_validate_json((folder / "progress.json").read_bytes())
    except (OSError, ValueError):
        return whole
    if progress.model_copy(update={"fingerprint": index.fingerprint}) != index:
        return whole
    for number, rows in enumerate(shards):
        try:
            shard = Shard.model_validate_json((folder / f"{number:05d}.json").read_bytes())
            if shard.count == len(rows) and (folder / shard.file).stat().st_size == shard.bytes:
                whole.add(number)
        except (OSError, ValueError):
            continue
    return whole


def _finish(folder: Path, index: Index, shards: Sequence[range], labels: np.ndarray) -> Index:
    records = [folder / f"{number:05d}.json" for number in range(len(shards))]
    made = tuple(Shard.model_validate_json(path.read_bytes()) for path in records)
    finished = index.model_copy(update={"shards": made, "labels": _save(folder / "labels.npy", labels)})
    write_json(folder / "index.json", finished)
    for path in (*records, folder / "progress.json"):
        path.unlink(missing_ok=True)
    return finished


def _save(path: Path, array: np.ndarray) -> Shard:
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
            return Shard(file=path.name, count=len(array), bytes=temporary.stat().st_size, sha256=_sha256(temporary))
    except OSError as error:
        raise _no_room(path, error) from error


def write_json(path: Path, content: Shard | Index) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        raise _no_room(path, error) from error


def _no_room(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be written ({one_line(error)}); free some space and run again: what is finished "
                     "is kept")  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its sorted names with the SHA-256 of each file."""
    if not path.is_dir():
        return _sha256(path)
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path)}:{_sha256(file)}\n".encode())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of the names, sizes and modification times below ``path``: alike means that nothing was touched."""
    digest = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.relative_to(path)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
