"""Input tensors of the Open Inference Protocol to the values of each image, or the error that names the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from robuq_core.config import MAX_SEED, NUM_TRAIN_TIMESTEPS
from server.api.errors import ApiError, invalid
from server.api.kserve_schemas import InferInput, InferRequest
from server.settings import MAX_IMAGES


@dataclass(frozen=True)
class InputTensor:
    """What an input may hold. ``most`` of ``class_id`` is the model's."""

    name: str
    datatype: Literal["INT64", "FP32"]
    least: int
    most: int


CLASS_ID = InputTensor("class_id", "INT64", 0, 2**31 - 1)
SEED = InputTensor("seed", "INT64", 0, MAX_SEED)
STEPS = InputTensor("steps", "INT64", 1, NUM_TRAIN_TIMESTEPS)
GUIDANCE_SCALE = InputTensor("guidance_scale", "FP32", 0, 20)
INPUTS = {tensor.name: tensor for tensor in (CLASS_ID, SEED, STEPS, GUIDANCE_SCALE)}


def read_inputs(body: InferRequest, num_classes: int) -> dict[str, list[Any]]:
    """Values by the tensor's name, one for each image or a single one for all; ``class_id`` tells how many images, and
    is all zeros for a model without classes.

    Raises:
        ApiError: 422 that names the input.
    """
    values: dict[str, list[Any]] = {}
    for position, tensor in enumerate(body.inputs):
        if tensor.name not in INPUTS:
            known = ", ".join(INPUTS)
            raise invalid(f"inputs[{position}].name", f"unknown input {tensor.name!r}; this model takes {known}")
        if tensor.name in values:
            raise invalid(f"inputs[{position}].name", f"input {tensor.name} comes twice")
        values[tensor.name] = _values(tensor, INPUTS[tensor.name], num_classes)
    images = len(values.get(CLASS_ID.name, ()))
    if not images:
        raise invalid("inputs", f"input class_id is missing; give its INT64 ids, 1 to {MAX_IMAGES} of them")
    for name, data in values.items():
        if len(data) not in (1, images):
            raise invalid(name, f"input {name} must have 1 value or {images}, as class_id has, not {len(data)}")
    return values


def _values(tensor: InferInput, kind: InputTensor, num_classes: int) -> list[Any]:
    if tensor.datatype != kind.datatype:
        raise invalid(kind.name, f"input {kind.name} must have the datatype {kind.datatype}, not {tensor.datatype}")
    data = _flat(tensor.data)
    if data is None or math.prod(tensor.shape) != len(data) or tensor.shape[1:] not in ([], [1]):
        raise invalid(kind.name, f"input {kind.name} must have the shape [n] or [n, 1], and n values in data")
    most = max(0, num_classes - 1) if kind is CLASS_ID else kind.most
    number = (int,) if kind.datatype == "INT64" else (int, float)
    for value in data:
        if isinstance(value, bool) or not isinstance(value, number) or not kind.least <= value <= most:
            raise _out_of_range(kind, most)
    return data


def _flat(data: list[Any]) -> list[Any] | None:
    """Elements of ``[n]`` or ``[n][1]``; None for anything else."""
    if not any(isinstance(item, list) for item in data):
        return data
    if all(isinstance(item, list) and len(item) == 1 for item in data):
        return [item[0] for item in data]
    return None


def _out_of_range(kind: InputTensor, most: int) -> ApiError:
    what = "integers" if kind.datatype == "INT64" else "numbers"
    return invalid(kind.name, f"input {kind.name} must hold {what} from {kind.least} to {most}")
