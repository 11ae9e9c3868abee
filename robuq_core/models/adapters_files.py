"""Tensors of foreign weight files, by name, each read when asked for: torch pickles, safetensors, whole or in shards.

Nothing is unpickled but tensors, plain containers and ``argparse.Namespace``, which the DiT training script stores.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robuq_core import files
from robuq_core.errors import UserError

WEIGHTS_NAME = "diffusion_pytorch_model"
# What DistributedDataParallel, torch.compile and trainers put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "ema_model.", "model.")


class WeightsError(UserError):
    """Full-precision weights that cannot be used; the message names the file, the tensor or key, and the fix."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; ``read`` gives it, mapped from the file where the format allows."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


TensorTable = dict[str, Stored]


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors mapped from the file.

    Raises:
        WeightsError: missing, damaged, or holding objects that plain weights have no need of.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a DiT .pt or .safetensors file or a diffusers folder")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if not zipfile.is_zipfile(path):  # files of old torch are no archives and cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
            files.check_torch_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or foreign file leads the unpickler to raise almost anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path}: not a file of plain torch weights ({reason}); copy it again, or save its "
                           "state dict alone with torch.save") from error  # fmt: skip


def tensors_of(path: Path, tree: Any) -> TensorTable:
    """A state dict as a table.

    Raises:
        WeightsError: something in it is no tensor.
    """
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise WeightsError(f"{path}: not a state dict; save the model's state_dict() with torch.save")
    strangers = [key for key, value in tree.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WeightsError(f"{path}: {', '.join(strangers[:3])} is no tensor; save the model's state_dict() alone")
    return {key: Stored(tuple(value.shape), partial(_given, path, key, value)) for key, value in tree.items()}


def unwrapped(table: TensorTable) -> TensorTable:
    """``table`` without the prefixes that wrappers of a model leave on all its names."""
    for prefix in _WRAPPERS * 2:  # each may be within another
        if table and all(key.startswith(prefix) for key in table):
            table = {key.removeprefix(prefix): stored for key, stored in table.items()}
    return table


def _given(path: Path, key: str, tensor: Tensor) -> Tensor:
    # A view may repeat a few stored numbers as often as it likes; what is computed from it would take the room.
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise WeightsError(f"{path}: {key} claims more values than the file holds; save the model's state_dict()")
    return tensor


def safetensors_of(path: Path) -> tuple[TensorTable, dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        WeightsError: missing or damaged file.
    """
    try:
        file: Any = safe_open(path, "pt")
        table = {}
        for name in sorted(file.keys()):
            table[name] = Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
        return table, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def folder_tensors(folder: Path) -> TensorTable:
    """The weights of a diffusers model folder: safetensors before ``.bin``, whole before shards.

    Raises:
        WeightsError: none found, a shard missing, or a damaged file.
    """
    for suffix in (".safetensors", ".bin"):
        whole, index = folder / f"{WEIGHTS_NAME}{suffix}", folder / f"{WEIGHTS_NAME}{suffix}.index.json"
        if whole.is_file():
            return _any_tensors(whole)
        if index.is_file():
            return _sharded(index)
    found = sorted(path.name for path in folder.glob(f"{WEIGHTS_NAME}*"))
    hint = f" (found {', '.join(found[:3])}: rename the variant you want)" if found else ""
    raise WeightsError(f"{folder}: no {WEIGHTS_NAME}.safetensors or .bin, whole or in shards{hint}")


def _any_tensors(path: Path) -> TensorTable:
    return safetensors_of(path)[0] if path.suffix == ".safetensors" else tensors_of(path, load_pickle(path))


def _sharded(index: Path) -> TensorTable:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: no weight_map; download the folder again")
    table: TensorTable = {}
    for name in sorted(set(weight_map.values())):
        # A shard lies beside its index: nothing else is followed.
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise WeightsError(f"{shard}: missing, but {index.name} names it; download the folder again")
        stored = _any_tensors(shard)
        table |= {key: entry for key, entry in stored.items() if weight_map.get(key) == name}
    missing = sorted(set(weight_map) - set(table))
    if missing:
        raise WeightsError(f"{index}: {missing[0]} is in none of the shards; download the folder again")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: unreadable, or not an object.
    """
    try:
        tree = files.read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return tree
