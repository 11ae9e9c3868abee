"""The resumable state of a stage: weights, their moving average, optimiser and step, in one file.

Written whole or not at all, and loaded with ``weights_only``: nothing in it can run code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.errors import UserError
from robuq_core.files import replacing


class StateError(UserError):
    """A training state that cannot be used; the message names the file and the fix."""


class EMA:
    """Exponential moving average of parameters; early on the decay is ``(1 + step) / (10 + step)``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [p.detach() for p in model.parameters()], 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.shadow, strict=False)


def save_state(path: Path, **state: Any) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        StateError: the file is missing, damaged or of another kind.
    """
    if not path.exists():
        raise StateError(f"{path} does not exist: run the stage that writes it first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise StateError(f"{path}: not a training state ({error}); delete it to start the stage again") from error
    if not isinstance(state, dict) or not {"step", "ema", "model", "history"} <= set(state):
        raise StateError(f"{path}: not a training state of this project; delete it to start the stage again")
    return state


def load_ema(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load the averaged weights of a state into ``model``; returns its ``step`` and ``history``.

    Raises:
        StateError: as :func:`load_state`, or the weights do not fit the model.
    """
    state = load_state(path)
    try:
        model.load_state_dict(state["model"])
        ema: dict[str, Tensor] = state["ema"]
        model.load_state_dict(ema, strict=False)
    except RuntimeError as error:
        raise StateError(f"{path}: weights do not fit the configured model: {error}") from error
    return {"step": state["step"], "history": state["history"]}
