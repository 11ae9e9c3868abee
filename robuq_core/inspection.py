"""What a packed checkpoint contains, as plain data: shape, bit table, size by part, and the paper's own accounting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robuq_core.checkpoint import Header, read_header
from robuq_core.models.quant_linear import is_adaln, layer_rank
from robuq_core.models.shapes import FREQUENCY_SIZE, dense_shapes, layer_macs, layer_shapes, parameter_shapes

_DENSE = "embedders and final layer"
_PARTS = {
    "trits": "ternary weights (base 3)",
    "alpha": "weight scales",
    "lowrank_a": "low-rank branch",
    "lowrank_b": "low-rank branch",
    "signs": "rotation signs",
    "bias": "biases",
}
# One full-precision multiply-accumulate counts as 64 of 1 x 1 bit and 4 of 8 x 8: the usual convention of binary
# networks (arXiv 2004.03333), with which the paper's figures come out.
_ONE_BIT_PER_FULL, _EIGHT_BIT_PER_FULL = 64, 4
# Bits of a ternary weight as the paper counts them: log2(3), truncated, without scales.
_TERNARY_BITS = 1.58


class Amount(NamedTuple):
    """Cost of a part of the network in full precision, and quantised."""

    full: float
    quantised: float


class Table(NamedTuple):
    """Texts to print."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def markdown(self) -> str:
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@dataclass(frozen=True)
class Report:
    """``file_bytes`` includes the header; ``fp32_bytes``: the parameters of the same network at 4 bytes each.

    ``compute``, ``theoretical_bytes``: see :func:`equivalent_macs` and :func:`theoretical_bytes`.
    """

    header: Header
    file_bytes: int
    fp32_bytes: int
    bytes_by_part: dict[str, int]
    compute: dict[str, Amount]
    theoretical_bytes: dict[str, Amount]

    @property
    def compression(self) -> float:
        return self.fp32_bytes / self.file_bytes

    def size_table(self) -> Table:
        parts = sorted(self.bytes_by_part.items(), key=lambda item: -item[1])
        rows = [(part, f"{size:,}", f"{size / self.file_bytes:.1%}") for part, size in parts]
        return Table(("Part of the file", "Bytes", "Share"), rows)

    def bit_table(self) -> Table:
        """Activation bits by block; blocks with the same widths share a row."""
        widths = list(self.header.bits.values())
        blocks = [tuple(map(str, widths[5 * i : 5 * i + 5])) for i in range(self.header.model.depth)]
        rows, first = [], 0
        for bits, group in groupby(blocks):
            last = first + len(list(group)) - 1
            rows.append((str(first) if first == last else f"{first}-{last}", *bits))
            first = last + 1
        return Table(("Block", "qkv", "proj", "fc1", "fc2", "adaLN"), rows)


def inspect_checkpoint(path: Path) -> Report:
    """Summarise the header of ``path``; reads no weights."""
    header = read_header(path)
    by_part: dict[str, int] = {}
    for name, entry in header.tensors.items():
        part = _PARTS[name.rpartition(".")[2]] if name.startswith("blocks.") else _DENSE
        item: int = getattr(torch, entry.dtype.removeprefix("torch.")).itemsize
        by_part[part] = by_part.get(part, 0) + prod(entry.shape) * item
    size = path.stat().st_size
    by_part["header"] = size - sum(by_part.values())
    fp32_bytes = 4 * sum(map(prod, parameter_shapes(header.model).values()))
    return Report(header, size, fp32_bytes, by_part, equivalent_macs(header), theoretical_bytes(header))


def ratio(parts: dict[str, Amount]) -> float:
    """Full-precision cost over quantised cost, in total."""
    return sum(part.full for part in parts.values()) / sum(part.quantised for part in parts.values())


def equivalent_macs(header: Header) -> dict[str, Amount]:
    """Multiply-accumulates per image and forward by part, and their equivalent in full-precision ones.

    A ternary weight times b bits counts as ``b / 64``, 8 by 8 bits of attention as ``1 / 4``; the low-rank branch, the
    embedders and the final layer are full precision. The paper calls these GFLOPs.
    """
    model, quant, d = header.model, header.quant, header.model.hidden_size
    bits, macs = header.bits, layer_macs(model)
    adaln, branch = {name for name in macs if is_adaln(name)}, 0
    for name, (out, into) in layer_shapes(model).items():
        branch += layer_rank(name, quant) * (out + into) * (1 if name in adaln else model.num_tokens)

    def linears(names: set[str]) -> Amount:
        weighted = sum(macs[name] * bits[name] for name in names)
        return Amount(sum(macs[name] for name in names), weighted * quant.weight_planes / _ONE_BIT_PER_FULL)

    attention = 2.0 * model.depth * model.num_tokens**2 * d
    patch = model.patch_size**2 * (model.in_channels + model.out_channels)
    rest = float(model.num_tokens * patch * d + FREQUENCY_SIZE * d + d * d + 2 * d * d)
    return {
        "linears of the blocks": linears(macs.keys() - adaln),
        "attention": Amount(attention, attention / (1 if quant.attention_bits is None else _EIGHT_BIT_PER_FULL)),
        "adaLN": linears(adaln),
        "low-rank branch": Amount(0, branch),
        _DENSE: Amount(rest, rest),
    }


def theoretical_bytes(header: Header) -> dict[str, Amount]:
    """Bytes by part as the paper counts them: 1.58 bits per ternary weight without scales, all else FP32.

    The file differs: 1.6 bits and scales, but a narrower branch, embedders and final layer.
    """
    model, quant = header.model, header.quant
    weights, branch, biases = {True: 0, False: 0}, 0, 0
    for name, (out, into) in layer_shapes(model).items():
        weights[is_adaln(name)] += out * into
        branch += layer_rank(name, quant) * (out + into)
        biases += out
    dense = sum(map(prod, dense_shapes(model).values())) + model.num_tokens * model.hidden_size
    ternary = quant.weight_planes * _TERNARY_BITS / 8
    rest = 4.0 * (dense + biases)
    return {
        "linears of the blocks": Amount(4.0 * weights[False], ternary * weights[False]),
        "adaLN": Amount(4.0 * weights[True], ternary * weights[True]),
        "low-rank branch": Amount(0, 4.0 * branch),
        "embedders, final layer, positions and biases": Amount(rest, rest),
    }


def short_provenance(tree: Any) -> Any:
    """A header's provenance without whole configurations and lists of names."""
    if isinstance(tree, dict):
        return {key: short_provenance(value) for key, value in tree.items() if key not in ("config", "class_names")}
    return [short_provenance(value) for value in tree] if isinstance(tree, list) else tree
