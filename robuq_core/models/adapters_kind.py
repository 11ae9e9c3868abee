"""What kind of DiT an official file holds: its tensors alone do not say.

DiT (noise), SiT (velocity) and REPA (velocity, time the other way round) share one network, and a class table of K rows
is one of K classes or of K - 1 and a row for none. What decides: the caller, then what the training script left in the
file, then the file's name. What nothing says is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from robuq_core.config import Flavour, PredictionType
from robuq_core.models.adapters_files import TensorTable, WeightsError

# The state dict within what training scripts save; an average before the raw weights.
_STATE_DICTS = ("ema", "ema_model", "state_dict_ema", "model", "state_dict", "delta")
_MOST_WRAPPERS = 4
_PROJECTORS = "projectors."
_IMAGENET_CLASSES = 1000
_ASK = ("say what the network predicts with prediction (--prediction): epsilon for DiT, flow for SiT, flow and "
        "flavour repa (--flavour repa) for REPA")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What the network predicts, and whose numerics it has."""

    prediction: PredictionType
    flavour: Flavour


def state_dict_in(tree: Any) -> Any:
    """The state dict in what ``torch.save`` was given, which may be wrapped more than once."""
    for _ in range(_MOST_WRAPPERS):  # a file may hold a mapping that holds itself
        inner = [tree[key] for key in _STATE_DICTS if isinstance(tree.get(key), dict)] if isinstance(tree, dict) else []
        if not inner:
            break
        tree = inner[0]
    return tree


def argument(arguments: object, name: str) -> Any:
    """What a training script was called with: ``arguments`` is a mapping or a namespace, or None."""
    return arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)


def network_alone(table: TensorTable) -> tuple[TensorTable, bool]:
    """``table`` without what REPA trains beside the network, under the names of today; and whether that was there."""
    projectors = any(key.startswith(_PROJECTORS) for key in table)
    first = len({key.split(".")[1] for key in table if key.startswith("blocks.")})
    named = {}
    for key, stored in table.items():
        if not key.startswith(_PROJECTORS):
            legacy = re.match(r"decoder_blocks\.(\d+)\.(.*)", key)
            named[f"blocks.{first + int(legacy[1])}.{legacy[2]}" if legacy else key] = stored
    return named, projectors


def kind_of(
    path: Path, arguments: object, projectors: bool, prediction: PredictionType | None, flavour: Flavour | None
) -> Kind:
    """The kind of an official file.

    Raises:
        WeightsError: nothing says it, the file says another, or it is one that is not supported.
    """
    said = _said(path, arguments, projectors)
    if said is not None:
        if prediction not in (None, said.prediction):
            raise WeightsError(f"{path}: prediction is {said.prediction} by what the file says, not {prediction}; "
                               "leave it out (--prediction)")  # fmt: skip
        if said.prediction == "flow" and flavour not in (None, said.flavour):
            raise WeightsError(f"{path}: flavour is {said.flavour} by what the file says, not {flavour}; "
                               "leave it out (--flavour)")  # fmt: skip
        return Kind(said.prediction, flavour or said.flavour)
    if prediction is None:
        guessed = _named(path.stem)
        if guessed is None:
            raise WeightsError(f"{path}: nothing in the file says which kind of DiT it is; {_ASK}")
        return Kind(guessed.prediction, flavour or guessed.flavour)
    return Kind(prediction, flavour or ("sit" if prediction == "flow" else "official"))


def _said(path: Path, arguments: object, projectors: bool) -> Kind | None:
    """What tensors and arguments of training say."""
    ours = argument(arguments, "prediction_type"), argument(arguments, "flavour")
    if ours[0] in get_args(PredictionType) and ours[1] in get_args(Flavour):
        return Kind(*ours)
    named = _named(str(argument(arguments, "model") or ""))
    repa = projectors or argument(arguments, "enc_type") is not None
    path_type, predicts = argument(arguments, "path_type"), argument(arguments, "prediction")
    if not repa and path_type is None and (named is None or named.prediction != "flow"):
        return named
    for name, value, allowed in (("path_type", path_type, ("linear",)), ("prediction", predicts, ("v", "velocity"))):
        if value is not None and str(value).lower() not in allowed:
            raise WeightsError(f"{path}: args.{name} {value!r} is not supported: a flow here has the linear path and "
                               "predicts the velocity")  # fmt: skip
    return Kind("flow", "repa" if repa else "sit")


def _named(name: str) -> Kind | None:
    """What a model's name says, such as ``SiT-XL/2``; a name of several kinds says nothing."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if "repa" in words:  # whose networks are called SiT
        return None if "dit" in words else Kind("flow", "repa")
    kinds = {"dit": Kind("epsilon", "official"), "sit": Kind("flow", "sit")}
    found = [kinds[word] for word in kinds if word in words]
    return found[0] if len(found) == 1 else None


def classes_of(path: Path, rows: int, arguments: object, num_classes: int | None) -> tuple[int, bool]:
    """``(num_classes, null_class)`` of a class table of ``rows``; a single row is that of a network without classes.

    Raises:
        WeightsError: nothing says how many classes there are, or the table has another number of rows.
    """
    if rows == 1:
        return 0, True
    said = argument(arguments, "num_classes") if num_classes is None else num_classes
    if not isinstance(said, int):
        if rows not in (_IMAGENET_CLASSES, _IMAGENET_CLASSES + 1):
            raise WeightsError(f"{path}: the class table has {rows} rows, for {rows} classes, or for {rows - 1} and "
                               "one for no class; say how many classes with num_classes (--classes)")  # fmt: skip
        said = _IMAGENET_CLASSES
    if rows - said not in (0, 1):
        raise WeightsError(
            f"{path}: the class table has {rows} rows, which does not fit num_classes {said} (--classes)"
        )
    return said, rows > said
