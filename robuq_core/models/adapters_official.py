"""The official ``.pt`` of DiT, SiT and REPA: what its tensors do not say.

The three share one network. DiT predicts noise, SiT and REPA velocities (in opposite time directions), and a class
table of K rows means K classes, or K - 1 and a null class. The caller decides first, then the arguments that the
training script stored in the file, then the file's name. If none of them says it, a :class:`WeightsError` asks for it.
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from robuq_core.config import Flavour, ModelConfig, PredictionType
from robuq_core.models.adapters_files import TensorTable, WeightsError
from robuq_core.models.dit import position_table
from robuq_core.models.presets import PRESETS

POSITIONS = "pos_embed"
_PROJECTORS = "projectors."
_IMAGENET_CLASSES = 1000
_ASK = ("say what the network predicts with prediction (--prediction): epsilon for DiT, flow for SiT, flow and "
        "flavour repa (--flavour repa) for REPA")  # fmt: skip
# Of a position table: tolerance in float32, and in units of a narrower type's precision.
_TOLERANCE, _STORED_STEPS = 1e-4, 4


class Hints(TypedDict, total=False):
    """What the caller knows about a weight file; None or absent: read it from the file.

    ``num_heads``, ``prediction``, ``num_classes``: of an official file that does not say. ``flavour``: the numerics to
    run with; default: those of the file's kind.
    """

    num_heads: int | None
    prediction: PredictionType | None
    num_classes: int | None
    flavour: Flavour | None


class Kind(NamedTuple):
    prediction: PredictionType
    flavour: Flavour


def official_shape(path: Path, table: TensorTable, arguments: object, hints: Hints) -> tuple[dict[str, Any], Kind]:
    """Values of :class:`~robuq_core.config.ModelConfig`, and the kind, of ``table`` as :func:`network_alone` gives it.

    Args:
        arguments: ``args`` of the training script, a mapping, a namespace or None.
    """
    if "pos_embed.proj.weight" in table:
        raise WeightsError(f"{path}: tensors of diffusers; give the folder that holds this file and its config.json")
    try:
        width, channels, patch, _ = table["x_embedder.proj.weight"].shape
        if POSITIONS not in table:
            raise WeightsError(f"{path}: {POSITIONS} is missing, and only it gives the size of the images; "
                               "save the whole state_dict() of the authors' model")  # fmt: skip
        _, tokens, _ = table[POSITIONS].shape
        rows = table["y_embedder.embedding_table.weight"].shape[0]
        outputs, hidden = table["final_layer.linear.weight"].shape[0], table["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"{path}: not the tensors of a class-conditional DiT: {error.args[0]} is missing") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not the tensors of a class-conditional DiT: {error}") from error
    repa = any(key.startswith(_PROJECTORS) for key in table)
    kind = _kind(path, arguments, repa, hints)
    classes, null_class = _classes(path, rows, arguments, hints.get("num_classes"))
    shape = {
        "input_size": isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "num_heads": hints.get("num_heads") or _argument(arguments, "num_heads") or _published_heads(path, width),
        "mlp_ratio": hidden // width,
        "num_classes": classes,
        "null_class": null_class,
        "flavour": kind.flavour,
        "learn_sigma": outputs != channels * patch**2,
        "position_scale": _argument(arguments, "position_scale") or 1.0,
    }
    return shape, kind


def network_alone(table: TensorTable) -> TensorTable:
    """``table`` without REPA's projectors, and with the blocks of its older releases under their present names."""
    first = len({key.split(".")[1] for key in table if key.startswith("blocks.")})
    named = {}
    for key, stored in table.items():
        if not key.startswith(_PROJECTORS):
            legacy = re.match(r"decoder_blocks\.(\d+)\.(.*)", key)
            named[f"blocks.{first + int(legacy[1])}.{legacy[2]}" if legacy else key] = stored
    return named


def _argument(arguments: object, name: str) -> Any:
    return arguments.get(name) if isinstance(arguments, dict) else getattr(arguments, name, None)


def _kind(path: Path, arguments: object, repa: bool, hints: Hints) -> Kind:
    prediction, flavour = hints.get("prediction"), hints.get("flavour")
    found = _stored_kind(path, arguments, repa)
    if found is not None:
        checked: dict[str, tuple[str | None, str]] = {"prediction": (prediction, found.prediction)}
        if found.prediction == "flow":
            checked["flavour"] = (flavour, found.flavour)
        for name, (asked, stored) in checked.items():
            if asked not in (None, stored):
                raise WeightsError(f"{path}: {name} is {stored} in the file, not {asked}; remove it (--{name})")
    elif prediction is not None:
        found = Kind(prediction, "sit" if prediction == "flow" else "official")
    elif (found := _kind_of_name(path.stem)) is None:
        raise WeightsError(f"{path}: nothing in the file says which kind of DiT it is; {_ASK}")
    return Kind(found.prediction, flavour or found.flavour)


def _stored_kind(path: Path, arguments: object, repa: bool) -> Kind | None:
    """The kind that REPA's projectors or the arguments of training give."""
    ours = _argument(arguments, "prediction_type"), _argument(arguments, "flavour")
    if ours[0] in get_args(PredictionType) and ours[1] in get_args(Flavour):
        return Kind(*ours)
    named = _kind_of_name(str(_argument(arguments, "model") or ""))
    repa = repa or _argument(arguments, "enc_type") is not None
    path_type, predicts = _argument(arguments, "path_type"), _argument(arguments, "prediction")
    if not repa and path_type is None and (named is None or named.prediction != "flow"):
        return named
    for name, value, allowed in (("path_type", path_type, ("linear",)), ("prediction", predicts, ("v", "velocity"))):
        if value is not None and str(value).lower() not in allowed:
            raise WeightsError(f"{path}: args.{name} {value!r} is not supported: a flow here has the linear path and "
                               "predicts the velocity")  # fmt: skip
    return Kind("flow", "repa" if repa else "sit")


def _kind_of_name(name: str) -> Kind | None:
    """The kind in a model's name, such as ``SiT-XL/2``; None if it names none or several."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if "repa" in words:  # its networks are called SiT
        words.discard("sit")
    kinds = {"dit": Kind("epsilon", "official"), "sit": Kind("flow", "sit"), "repa": Kind("flow", "repa")}
    found = [kinds[word] for word in kinds.keys() & words]
    return found[0] if len(found) == 1 else None


def _classes(path: Path, rows: int, arguments: object, num_classes: int | None) -> tuple[int, bool]:
    """``(num_classes, null_class)`` of a class table of ``rows``; a single row is the null class."""
    if rows == 1:
        return 0, True
    count = _argument(arguments, "num_classes") if num_classes is None else num_classes
    if not isinstance(count, int):
        if rows not in (_IMAGENET_CLASSES, _IMAGENET_CLASSES + 1):
            raise WeightsError(f"{path}: the class table has {rows} rows, for {rows} classes, or for {rows - 1} and "
                               "a null class; give num_classes (--classes)")  # fmt: skip
        count = _IMAGENET_CLASSES
    if rows - count not in (0, 1):
        raise WeightsError(f"{path}: the class table has {rows} rows, which does not fit num_classes {count} "
                           "(--classes)")  # fmt: skip
    return count, rows > count


def _published_heads(path: Path, width: int) -> int:
    heads = {shape.hidden_size: shape.num_heads for shape in PRESETS.values()}.get(width)
    if heads is None:
        raise WeightsError(f"{path}: the tensors do not say how many attention heads a width of {width} has; "
                           "give num_heads (--heads)")  # fmt: skip
    return heads


def check_positions(path: Path, key: str, positions: Tensor, config: ModelConfig) -> None:
    """Refuse a position table ``[1, L, D]`` of any float type that is not the sin-cos table of ``config``."""
    expected = position_table(config)[None]
    if positions.shape == expected.shape and positions.is_floating_point():
        tolerance = max(_TOLERANCE, _STORED_STEPS * torch.finfo(positions.dtype).eps)
        if torch.allclose(positions.float(), expected, rtol=0, atol=tolerance):
            return
    raise WeightsError(f"{path}: {key} is not DiT's sin-cos table of {config.num_tokens} positions, "
                       f"{config.position_scale:g} apart; learned positions are not supported")  # fmt: skip
