"""Measured launch shapes, one table per GPU model: shipped with the package (``tuned/``) or measured by the user.

A table is read once, when a backend starts. Nothing is measured while a model is served: a launch shape that is not in
the tables is the kernel's default. The user's table, in ``$ROBUQ_CACHE_DIR`` or ``~/.cache/robuq``, comes first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import TypeAdapter

from robuq_core.errors import UserError
from robuq_core.files import read_bounded, replacing
from robuq_core.kernels.triton.config import LaunchConfig
from robuq_core.kernels.triton.ternary_linear import row_bucket

CACHE_VARIABLE = "ROBUQ_CACHE_DIR"
SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, LaunchConfig]
_TABLE = TypeAdapter(Table)


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
    return read_table(SHIPPED / table_name(gpu)) | read_table(user_table(gpu))


def read_table(path: Path) -> Table:
    """Empty without the file; raises as :func:`load_table`."""
    try:
        return _TABLE.validate_json(read_bounded(path), strict=True) if path.is_file() else {}
    except (OSError, ValueError) as error:
        found = f"{error}".replace("\n", " ")
        raise TuningTableError(f"{path} is no table of launch shapes ({found}): delete it or measure again") from error


def save_table(gpu: str, measured: Table) -> Path:
    """Add ``measured`` to the user's table of ``gpu``, whole or not at all; returns the file."""
    path = user_table(gpu)
    merged = read_table(path) | measured
    with replacing(path) as temporary:
        temporary.write_bytes(_TABLE.dump_json(dict(sorted(merged.items())), indent=1) + b"\n")
    return path
