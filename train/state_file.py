"""The file of a training state: written whole or not at all, and loaded with ``weights_only``.

Nothing in it can run code. What the parts mean is :mod:`train.state`'s and :mod:`train.state_shards`' business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robuq_core.errors import UserError
from robuq_core.files import check_torch_archive, replacing
from train.messages import one_line

_WHOLE = {"step", "model", "ema", "optimiser", "history"}
_SHARDED = {"step", "param_groups", "shards", "files", "history"}
_REMEDY = "delete it to start the stage again"


class StateError(UserError):
    """A training state that cannot be used; the message names the file and the fix."""


def cannot_write(path: Path, error: BaseException) -> StateError:
    """What to say when ``error`` kept the state at ``path`` from being written."""
    return StateError(f"{path}: cannot write the training state ({one_line(error)}); the one before is intact: "
                      "free some space and run again")  # fmt: skip


def save_state(path: Path, **state: Any) -> None:
    """Write ``state``; a state that was there before stays until the new one is whole.

    Raises:
        StateError: it cannot be written (a full disk, a read-only folder).
    """
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise cannot_write(path, error) from error


def read_state_file(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote: a whole state, or the file that names the shards of one.

    Raises:
        StateError: the file is missing, damaged or of another kind.
    """
    if not path.exists():
        raise StateError(f"{path} does not exist: run the stage that writes it first")
    try:
        check_torch_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file leads the unpickler to raise almost anything
        raise StateError(f"{path}: not a whole training state ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(state, dict) or not (set(state) >= _WHOLE or set(state) >= _SHARDED):
        raise StateError(f"{path}: not a training state of this project; {_REMEDY}")
    return state
