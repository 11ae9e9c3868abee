"""Measured launch shapes, one table a GPU model: shipped with the package (``tuned/``) or measured by the user.

A table is read once, when a backend starts. Nothing is measured while a model is served: a launch shape that is not in
the tables is the kernel's default. The user's table, in ``$ROBUQ_CACHE_DIR`` or ``~/.cache/robuq``, comes first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robuq_core.errors import UserError
from robuq_core.files import read_json, replacing
from robuq_core.kernels.triton.config import LaunchConfig
from robuq_core.kernels.triton.ternary_linear import row_bucket

CACHE_VARIABLE = "ROBUQ_CACHE_DIR"
SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, LaunchConfig]


class TuningTableError(UserError, ValueError):
    """A table of launch shapes that cannot be read."""


def ternary_linear_key(rows: int, outputs: int, width: int, rank: int) -> str:
    """What a launch of the ternary product is tuned under: its shape, rows rounded up to a bucket. Results in float32
    and in bfloat16 share it."""
    return f"ternary_linear rows={row_bucket(rows)} N={outputs} K={width} rank={rank}"


def table_name(gpu: str) -> str:
    """File name of a GPU's table: ``NVIDIA H200`` -> ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_table(gpu: str) -> Path:
    """Where the user's own measurements for ``gpu`` are kept."""
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else Path.home() / ".cache" / "robuq") / "triton" / table_name(gpu)


def load_table(gpu: str) -> Table:
    """Every known launch shape for ``gpu``, by key; empty where nothing was measured.

    Raises:
        TuningTableError: a table is not what :func:`save_table` writes; the message names the file and the fix.
    """
    table: Table = {}
    for path in (SHIPPED / table_name(gpu), user_table(gpu)):
        if path.is_file():
            table |= _read(path)
    return table


def _read(path: Path) -> Table:
    try:
        return {key: _config(entry) for key, entry in read_json(path).items()}
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TuningTableError(
            f"{path} is no table of launch shapes ({error!r}): delete it or measure again"
        ) from error


def _config(entry: Mapping[str, Any]) -> LaunchConfig:
    blocks, num_warps, num_stages = entry["blocks"], entry["num_warps"], entry["num_stages"]
    registers = entry.get("max_registers")
    sizes = [num_warps, num_stages, *blocks.values(), *([] if registers is None else [registers])]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("sizes must be positive integers")
    return LaunchConfig(dict(blocks), num_warps, num_stages, registers)


def save_table(gpu: str, measured: Table) -> Path:
    """Add ``measured`` to the user's table of ``gpu``, whole or not at all; returns the file."""
    path = user_table(gpu)
    merged = (_read(path) if path.is_file() else {}) | measured
    entries = {key: asdict(config) for key, config in sorted(merged.items())}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n")
    return path


def fastest(
    configs: Iterable[LaunchConfig],
    milliseconds: Callable[[LaunchConfig], float],
    agrees: Callable[[LaunchConfig], bool],
    out_of_time: Callable[[], bool],
) -> tuple[LaunchConfig, float] | None:
    """The quickest of ``configs`` whose result agrees, with its time; ``None`` if there is none.

    A launch shape that the GPU refuses is passed over. Stops early, with what it has, once ``out_of_time``.
    """
    best: tuple[LaunchConfig, float] | None = None
    for config in configs:
        if out_of_time():
            break
        try:
            if not agrees(config):
                continue
            taken = milliseconds(config)
        except Exception:  # too much shared memory, too many registers: each library has errors of its own
            continue
        if best is None or taken < best[1]:
            best = config, taken
    return best
