"""States of sharded training: each process writes its slices, and any number of processes reads them back.

The state's own file (``qat.pt``) then holds what is small, and the name of a folder beside it
(``qat.shards/step-...``) with one safetensors file a process, written by ``torch.distributed.checkpoint``. The folder
is written under a temporary name and renamed, and becomes the state when the file that names it is replaced.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from robuq_core.files import publish_folder
from train.messages import one_line
from train.parallel import on_first, rank, stop_all, world_size
from train.state_file import StateError, cannot_write, save_state

Moments = Mapping[int, Mapping[str, Tensor]]


def is_pointer(state: Mapping[str, Any]) -> bool:
    """Whether ``state``, read from its file, is whole but for the folder of shards that it names."""
    return "shards" in state


def shards_folder(path: Path) -> Path:
    """Where the shards of the state at ``path`` lie."""
    return path.with_suffix(".shards")


def save_shards(
    path: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimiser: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Write a state of which each process holds slices; all processes call this together.

    A state that was there before stays until the new one is whole.

    Raises:
        StateError: it cannot be written; the other processes end.
    """
    name = f"step-{step:08d}"
    folder = shards_folder(path) / name
    temporary = folder.with_name(f".{name}")
    on_first(lambda: _clear(path, temporary))
    tensors = _flat(model, ema, optimiser["state"])
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    try:
        with _lone_is_fine():
            save(tensors, storage_writer=writer, no_dist=world_size() == 1)
    except (CheckpointException, OSError) as error:
        stop_all(cannot_write(path, _cause(error)))  # every process has got the same exception
    own = {file.name: _fingerprint(file) for file in temporary.glob(f"shard-{rank() + 1:05d}-*")}
    files: list[dict[str, list[int]]] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(files, own)

    def publish() -> None:
        try:
            if folder.exists():  # a run that was killed before it named the folder
                shutil.rmtree(folder)
            publish_folder(temporary, folder)
        except OSError as error:
            _fail(path, error)
        save_state(
            path,
            step=step,
            history=history,
            param_groups=optimiser["param_groups"],
            shards=name,
            files={key: value for each in files for key, value in each.items()},
        )
        for other in shards_folder(path).iterdir():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    on_first(publish)


def _clear(path: Path, temporary: Path) -> None:
    try:
        for left_over in shards_folder(path).glob(".step-*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    except OSError as error:
        _fail(path, error)


def _fail(path: Path, error: BaseException) -> None:
    raise cannot_write(path, error) from error


def _fingerprint(file: Path) -> list[int]:
    """Length in bytes and CRC-32 of a file."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]


def _flat(model: Mapping[str, Tensor], ema: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """All tensors of a state by one dotted name each; views, so that loading into them loads into the state."""
    return {
        **{f"model.{name}": value for name, value in model.items()},
        **{f"ema.{name}": value for name, value in ema.items()},
        **{f"optimiser.{i}.{name}": value for i, moment in moments.items() for name, value in moment.items()},
    }


def _folder_of(path: Path, pointer: Mapping[str, Any]) -> Path:
    """The folder that ``pointer``, read from ``path``, names, with every file in it as it was written.

    Raises:
        StateError: a file is missing or damaged.
    """
    folder = shards_folder(path) / Path(pointer["shards"]).name
    for i, (name, fingerprint) in enumerate(sorted(pointer["files"].items())):
        file = folder / Path(name).name
        if not file.exists():
            raise StateError(f"{file}: missing, and {path} needs it; put it back, or delete {path} to start again")
        if i % world_size() == rank() and _fingerprint(file) != list(fingerprint):
            raise StateError(f"{file}: damaged (checksum); delete {path} to start the stage again")
    return folder


def read_shards_into(
    path: Path, pointer: Mapping[str, Any], *, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], moments: Moments
) -> None:
    """Fill tensors, each process its own slices, however many processes wrote the state.

    Raises:
        StateError: a file is missing or damaged. RuntimeError, ValueError, KeyError: other names or shapes.
    """
    _read(_folder_of(path, pointer), _flat(model, ema, moments))


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    alone = alone or world_size() == 1
    try:
        with _lone_is_fine():
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise RuntimeError(one_line(_cause(error))) from error


@contextmanager
def _lone_is_fine() -> Iterator[None]:
    """Without the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> BaseException:
    """What went wrong in one of the processes; the exception of all of them would quote its stack."""
    causes = [each[0] for each in error.failures.values()] if isinstance(error, CheckpointException) else []
    return causes[0] if causes else error


def read_whole(path: Path, pointer: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state that ``pointer``, read from ``path``, names, whole, as a lone process would have saved it.

    Raises:
        StateError: a file is missing or damaged.
    """
    folder = _folder_of(path, pointer)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in stored.items()
        if isinstance(each, TensorStorageMetadata)
    }
    _read(folder, tensors, alone=True)
    state: dict[str, Any] = {"model": {}, "ema": {}, "optimiser": {"state": {}}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part == "optimiser":
            i, _, name = name.partition(".")
            state[part]["state"].setdefault(int(i), {})[name] = value
        else:
            state[part][name] = value
    state["optimiser"]["param_groups"] = pointer["param_groups"]
    return {**state, "step": pointer["step"], "history": pointer["history"]}
