"""Tensors of foreign weight files by name, each read when asked for: torch pickles and safetensors.

Only tensors, plain containers and ``argparse.Namespace`` (which DiT's training script stores) are unpickled.
What cannot be used raises :class:`WeightsError`.
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
# Prefixes that DistributedDataParallel, torch.compile and trainers add to every name.
_WRAPPERS = ("module.", "_orig_mod.", "ema_model.", "model.")
# Keys of the state dict in the files of training scripts; averaged weights before raw ones.
_STATE_DICTS = ("ema", "ema_model", "state_dict_ema", "model", "state_dict", "delta")
_MOST_NESTED = 4


class WeightsError(UserError):
    """Full-precision weights that cannot be used; the message names the file, the tensor or key, and the fix."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; ``read`` returns it, memory-mapped where the format allows."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


TensorTable = dict[str, Stored]


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors memory-mapped."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a DiT .pt or .safetensors file or a diffusers folder")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if not zipfile.is_zipfile(path):  # files of old torch are not archives and cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
            files.check_torch_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises almost anything on a damaged or foreign file
        # torch's own advice is to load without weights_only: only the reason after it is shown.
        detail = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = detail.strip().partition("\n")[0].partition(". Please")[0]
        reason = type(error).__name__ if not reason or "weights_only" in reason else reason
        raise WeightsError(f"{path}: not a file of plain torch weights ({reason}); copy it again, or save its "
                           "state dict alone with torch.save") from error  # fmt: skip


def state_dict_in(tree: Any) -> Any:
    """The state dict in the tree of a training script's file, which may be nested."""
    for _ in range(_MOST_NESTED):  # bounded: a mapping may contain itself
        inner = [tree[key] for key in _STATE_DICTS if isinstance(tree.get(key), dict)] if isinstance(tree, dict) else []
        if not inner:
            break
        tree = inner[0]
    return tree


def tensors_of(path: Path, tree: Any) -> TensorTable:
    """A state dict as a table."""
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise WeightsError(f"{path}: not a state dict; save the model's state_dict() with torch.save")
    others = [key for key, value in tree.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(f"{path}: {', '.join(others[:3])} is no tensor; save the model's state_dict() alone")
    return {key: Stored(tuple(value.shape), partial(_checked_size, path, key, value)) for key, value in tree.items()}


def _checked_size(path: Path, key: str, tensor: Tensor) -> Tensor:
    # A strided view may repeat a few stored values without limit; copies of it would fill the memory.
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise WeightsError(f"{path}: {key} claims more values than the file holds; save the model's state_dict()")
    return tensor


def without_wrappers(table: TensorTable) -> TensorTable:
    """``table`` without prefixes that all of its names share, such as ``module.``."""
    for prefix in _WRAPPERS * 2:  # they may be nested in any order
        if table and all(key.startswith(prefix) for key in table):
            table = {key.removeprefix(prefix): stored for key, stored in table.items()}
    return table


def safetensors_of(path: Path) -> tuple[TensorTable, dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        file: Any = safe_open(path, "pt")
        table = {
            name: Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
            for name in sorted(file.keys())
        }
        return table, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def folder_tensors(folder: Path) -> TensorTable:
    """The weights of a diffusers model folder; prefers safetensors to ``.bin``."""
    whole = folder / f"{WEIGHTS_NAME}.safetensors"
    if whole.is_file():
        return safetensors_of(whole)[0]
    if (pickled := whole.with_suffix(".bin")).is_file():
        return tensors_of(pickled, load_pickle(pickled))
    found = sorted(path.name for path in folder.glob(f"{WEIGHTS_NAME}*"))
    hint = f" (found {', '.join(found[:3])}: join shards, or rename the variant you want)" if found else ""
    raise WeightsError(f"{folder}: no {WEIGHTS_NAME}.safetensors or .bin{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        tree = files.read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path}: expected a JSON object")
    return tree
