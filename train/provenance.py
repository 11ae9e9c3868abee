"""What a stage was made from: its inputs, to compare with those of now, and the command and commit that ran it."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robuq_core import __version__
from robuq_core.config import StrictModel
from train.config import TrainConfig
from train.logs import one_line

# Keys of a training stage that do not change its numbers beyond rounding, or whose file's content is compared instead.
_IDLE = {"save_every", "keep_every", "log_every", "eval_every", "eval_samples", "accumulate",
         "activation_checkpointing", "parallel", "pretrained", "warm_start"}  # fmt: skip
_ABSOLUTE_PATH = re.compile(r"(?P<before>(?:-\w|[^/]*=)?)(?P<path>/.*)")

# Old and new value by input.
Changed = dict[str, tuple[Any, Any]]


class Record(StrictModel):
    """What a stage was made from, by name, and the digest of what it wrote."""

    inputs: dict[str, Any]
    output: str
    finished: bool = True


def settings_of(config: TrainConfig, *keys: str) -> dict[str, Any]:
    """The values of ``keys`` (a section, ``section.key`` or a top-level key) by dotted key."""
    tree, found = config.model_dump(mode="json"), dict[str, Any]()
    for key in keys:
        section, _, leaf = key.partition(".")
        value = tree[section][leaf] if leaf else tree[section]
        if isinstance(value, Mapping) and not leaf:
            found.update({f"{section}.{name}": each for name, each in value.items()})
        else:
            found[key] = value
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changed:
    """Every input that differs and changes numbers; one that the older record does not know is taken as the same."""

    def matters(key: str) -> bool:
        return key.startswith(("content of ", "output of ")) or key.partition(".")[2] not in _IDLE

    return {key: (before[key], value) for key, value in now.items()
            if matters(key) and key in before and before[key] != value}  # fmt: skip


def unfit_changes(stage: str, changed: Changed, finished: bool) -> str:
    """Those after which training cannot continue, described; empty if only its own schedule changed.

    Of a finished stage it must have grown longer.
    """
    before, now = changed.get(f"{stage}.steps", (0, 0))
    continues = not finished or now > before
    bad = {key: pair for key, pair in changed.items()
           if not (continues and (key == "precision" or key.startswith(f"{stage}.")))}  # fmt: skip
    if not bad:
        return ""
    old = ", ".join(f"{key} {_shown(value)}" for key, (value, _) in bad.items())
    return f"{old}, but the configuration says {', '.join(_shown(value) for _, value in bad.values())}"


def described(changed: Changed) -> str:
    """``quant.rank 16 is now 8, content of data.path 1234567890ab is now 0987654321ba``."""
    return ", ".join(f"{key} {_shown(old)} is now {_shown(new)}" for key, (old, new) in changed.items())


def _shown(value: Any) -> str:
    """``value`` for a message: digests by their beginning, long tables cut."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else one_line(ValueError(str(value)), 80)


def git_commit() -> str:
    """Commit of the source tree, with ``+changes`` if its code differs from it; ``unknown`` outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside a repository that has nothing to do with it.
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--", ":(top,glob)robuq_core/**/*.py", ":(top,glob)train/**/*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_provenance(config: TrainConfig, data_sha256: str | None) -> dict[str, Any]:
    """What reproduces a stage. Of files outside the working folder only the name is kept, not where they lay.

    ``data_sha256``: of the data that it trained on, if it did.
    """
    tree = config.model_dump(mode="json")
    tree["run_dir"], tree["data"]["path"] = _without_folder(tree["run_dir"]), config.data.path.name
    for section, key in (("data", "class_names"), ("data", "vae"), ("teacher", "pretrained"), ("qat", "warm_start")):
        if tree[section][key] is not None:
            tree[section][key] = _without_folder(tree[section][key])
    program = Path(sys.argv[0]).name
    return {
        "config": tree,
        "seed": config.seed,
        "data": {"name": config.data.path.name, "sha256": data_sha256},
        "commit": git_commit(),
        "command": " ".join(["robuq-train" if program == "cli.py" else program, *map(_without_folder, sys.argv[1:])]),
        "versions": {"robuq": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }


def _without_folder(argument: str) -> str:
    """``argument`` (``PATH``, ``key=PATH`` or ``-cPATH``) with an absolute path cut to its name."""
    match = _ABSOLUTE_PATH.fullmatch(argument)
    return f"{match['before']}{Path(match['path']).name}" if match else argument
