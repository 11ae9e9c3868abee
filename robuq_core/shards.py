"""Folders of safetensors that several processes wrote together (``torch.distributed.checkpoint``), read as one table.

Only its safetensors form is used here: the metadata of its own form is a pickle, which runs code when it is read.
A folder that is damaged, or lacks a tensor, raises ValueError.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor in ``folder``, by name."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}: not a folder of tensors ({error})") from error
    tensors = {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}
    claimed = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors.values())
    if claimed > sum(file.stat().st_size for file in folder.iterdir()):
        raise ValueError(f"{folder}: a file claims more than it holds")
    return tensors


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` by name; of a sharded one (DTensor) only the part that this process holds is read."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist asks for
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder}: {cause}") from error


def read_all(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """Every tensor in ``folder`` whose name starts with one of ``prefixes``, whole, on the CPU."""
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in stored_tensors(folder).items()
        if name.startswith(prefixes)
    }
    read_into(folder, tensors)
    return tensors
