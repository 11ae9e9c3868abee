"""Where a checkpoint came from: command, data, seed and commit, as its header keeps them."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from robuq_core import __version__
from train.config import TrainConfig

_ABSOLUTE_PATH = re.compile(r"(?P<before>(?:-\w|[^/]*=)?)(?P<path>/.*)")


def git_commit() -> str:
    """Commit of the source tree, with ``+changes`` if its code differs from it; ``unknown`` outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside a repository that has nothing to do with it.
        git("ls-files", "--error-unmatch", here.name)
        changes = git("status", "--porcelain", "--", ":(top,glob)robuq_core/**/*.py", ":(top,glob)train/**/*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_provenance(config: TrainConfig, data_sha256: str | None) -> dict[str, Any]:
    """What reproduces a stage. Of files outside the working folder only the name is kept, not where they lay.

    ``data_sha256``: of the data that it trained on, if it did.
    """
    tree = config.model_dump(mode="json")
    tree["run_dir"] = _without_folder(tree["run_dir"])
    tree["data"]["path"] = config.data.path.name
    for section, key in (("data", "class_names"), ("data", "vae"), ("teacher", "pretrained"), ("qat", "warm_start")):
        if tree[section][key] is not None:
            tree[section][key] = _without_folder(tree[section][key])
    return {
        "config": tree,
        "seed": config.seed,
        "data": {"name": config.data.path.name, "sha256": data_sha256},
        "commit": git_commit(),
        "command": " ".join([_program(), *(_without_folder(argument) for argument in sys.argv[1:])]),
        "versions": {"robuq": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "robuq-train" if name == "cli.py" else name


def _without_folder(argument: str) -> str:
    """``argument`` (``PATH``, ``key=PATH`` or ``-cPATH``) with an absolute path cut to its name."""
    match = _ABSOLUTE_PATH.fullmatch(argument)
    return f"{match['before']}{Path(match['path']).name}" if match else argument
