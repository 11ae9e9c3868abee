"""The resumable state of a stage: weights, their moving average, optimiser and step."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.messages import one_line
from train.parallel import local, on_first
from train.state_file import StateError, cannot_write, read_state_file, save_state
from train.state_shards import is_pointer, read_whole, shards_folder

__all__ = ["EMA", "StateError", "check_settings", "exclusive", "keep_state", "load_ema", "load_state", "save_state"]


class EMA:
    """Exponential moving average of parameters; early on the decay is ``(1 + step) / (10 + step)``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(shadow, [local(p.detach()) for p in model.parameters()], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` has the averaged weights."""
        own = [local(p.detach()) for p in model.parameters()]
        kept = [value.clone() for value in own]
        with torch.no_grad():
            torch._foreach_copy_(own, [local(value) for value in self.shadow.values()])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)

    def restore(self, shadow: dict[str, Tensor]) -> None:
        """Go on from a saved average.

        Raises:
            ValueError: its names or shapes are not the model's.
        """
        if _shapes(shadow) != _shapes(self.shadow):
            raise ValueError("the averaged weights are not those of the model")
        for name, value in self.shadow.items():
            value.copy_(shadow[name])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep the state at ``path`` to this run: two runs of one stage would overwrite each other's steps.

    Also removes what a run that was killed while it saved has left beside it.

    Raises:
        StateError: another process holds it, or its folder cannot be made.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(locked(path)))
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise StateError(f"run_dir {path.parent}: cannot be written to ({error})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"{path}: another process trains this stage; wait for it, or choose another run_dir"
            ) from error
        for left_over in path.parent.glob(f".{path.name}.*"):
            left_over.unlink(missing_ok=True)
        yield


def load_state(path: Path) -> dict[str, Any]:
    """Read a state, whole: ``step``, ``model``, ``ema``, ``optimiser`` and ``history``, in one file or in shards.

    Raises:
        StateError: the file is missing, damaged or of another kind.
    """
    state = read_state_file(path)
    return read_whole(path, state) if is_pointer(state) else state


def keep_state(path: Path, step: int) -> None:
    """Keep the state at ``path``, of ``step``, as ``kept/STAGE-STEP.pt``: a hard link, or a copy where there is none.

    Raises:
        StateError: it cannot be written.
    """
    kept = path.parent / "kept" / f"{path.stem}-{step:07d}.pt"
    shards = shards_folder(path)
    try:
        kept.parent.mkdir(exist_ok=True)
        for file in [*shards.rglob("*.safetensors"), path]:
            target = shards_folder(kept) / file.relative_to(shards) if file != path else kept
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # of a run that was killed and takes these steps again
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
    except OSError as error:
        raise cannot_write(kept, error) from error


def check_settings(path: Path, state: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Compare what ``state`` was last trained with against ``settings``, by dotted key of the configuration.

    For settings that change what the weights mean and not their shapes, so that nothing else would notice.

    Raises:
        StateError: a setting differs; the message names it and both values.
    """
    trained = state["history"][-1].get("config", {}) if state["history"] else {}
    for key, wanted in settings.items():
        found: Any = trained
        for part in key.split("."):
            found = found.get(part, wanted) if isinstance(found, dict) else wanted
        if found != wanted:
            raise StateError(f"{path}: trained with {key} {found}, but the configuration says {wanted}; restore the "
                             "configuration it was made with, or delete it to start the stage again")  # fmt: skip


def load_ema(path: Path, model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load the averaged weights of a state into ``model``; returns its ``step`` and ``history``.

    Raises:
        StateError: as :func:`load_state` and :func:`check_settings`, or the weights do not fit the model.
    """
    state = load_state(path)
    check_settings(path, state, settings)
    try:
        model.load_state_dict(state["model"])
        EMA(model, decay=0).restore(state["ema"])
        model.load_state_dict(state["ema"], strict=False)
    except (RuntimeError, ValueError) as error:
        raise StateError(f"{path}: weights do not fit the configured model ({one_line(error)})") from error
    return {"step": state["step"], "history": state["history"]}
