"""Where a checkpoint came from: command, data, seed and commit, as its header keeps them."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from robuq_core import __version__
from train.config import TrainConfig


def git_commit() -> str:
    """Commit of the source tree, with ``+changes`` if files differ from it; ``unknown`` outside a checkout."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def data_digest(path: Path) -> str:
    """SHA-256 of a data file; of the sorted names and sizes for a folder."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode())
    else:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def run_provenance(config: TrainConfig) -> dict[str, Any]:
    """What reproduces a stage. Only the data's name is kept, not where it lay."""
    tree = config.model_dump(mode="json")
    tree["data"]["path"] = config.data.path.name
    return {
        "config": tree,
        "seed": config.seed,
        "data": {"name": config.data.path.name, "sha256": data_digest(config.data.path)},
        "commit": git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *(_without_folder(argument) for argument in sys.argv[1:])]),
        "versions": {"robuq": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }


def _without_folder(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith("/") else argument
