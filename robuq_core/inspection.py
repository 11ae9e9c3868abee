"""What a packed checkpoint holds, as plain data: shape, bit table, size by part."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from robuq_core.checkpoint import Header, read_header
from robuq_core.models.dit import DiT

_PARTS = {
    "trits": "ternary weights (base 3)",
    "alpha": "weight scales",
    "lowrank_a": "low-rank branch",
    "lowrank_b": "low-rank branch",
    "signs": "rotation signs",
    "bias": "biases",
}


@dataclass(frozen=True)
class Report:
    """``file_bytes`` includes the header; ``fp32_bytes`` is the same network's parameters at 4 bytes each."""

    header: Header
    file_bytes: int
    fp32_bytes: int
    bytes_by_part: dict[str, int]

    @property
    def compression(self) -> float:
        return self.fp32_bytes / self.file_bytes


def inspect_checkpoint(path: Path) -> Report:
    """Read the header of ``path`` (no weights) and sum it up.

    Raises:
        CheckpointError: as :func:`robuq_core.checkpoint.read_header`.
    """
    header = read_header(path)
    by_part: dict[str, int] = {}
    for name, entry in header.tensors.items():
        part = _PARTS.get(name.rpartition(".")[2], "") if name.startswith("blocks.") else ""
        part = part or "embedders and final layer"
        item = torch.empty(0, dtype=getattr(torch, entry.dtype.removeprefix("torch."))).element_size()
        by_part[part] = by_part.get(part, 0) + prod(entry.shape) * item
    size = path.stat().st_size
    by_part["header"] = size - sum(by_part.values())
    return Report(header, size, fp32_bytes(header), by_part)


def fp32_bytes(header: Header) -> int:
    """Bytes of the full-precision network of the same shape, positions not counted."""
    with torch.device("meta"):
        skeleton: nn.Module = DiT(header.model)
    return 4 * sum(parameter.numel() for parameter in skeleton.parameters())
