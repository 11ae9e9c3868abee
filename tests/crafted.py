"""Packed checkpoints that a stranger might have written: any header, any tensors, checksums that agree."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

DEEP = 200_000
Tree = dict[str, Any]


def split(raw: bytes) -> tuple[Tree, bytes]:
    """The JSON at the start of a safetensors file, and the bytes of its tensors."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(outer: Tree | str, body: bytes) -> bytes:
    """Inverse of :func:`split`; ``outer`` may be text that is no JSON."""
    text = (outer if isinstance(outer, str) else json.dumps(outer)).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_header(raw: bytes, edit: Callable[[Tree], Any]) -> bytes:
    """``raw`` with the project's header as ``edit`` leaves it, or the text that it returns; the tensors stay."""
    outer, body = split(raw)
    inner = json.loads(outer["__metadata__"]["robuq"])
    edited = edit(inner)
    outer["__metadata__"]["robuq"] = edited if isinstance(edited, str) else json.dumps(inner)
    return join(outer, body)


def with_tensor(raw: bytes, name: str, edit: Callable[[Tensor], Tensor | None]) -> bytes:
    """``raw`` with one tensor changed in place, or replaced, and its entry in the header true to it."""
    tensors = load(raw)
    edited = edit(tensors[name])
    tensor = tensors[name] = tensors[name] if edited is None else edited
    inner = json.loads(split(raw)[0]["__metadata__"]["robuq"])
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    inner["tensors"][name] = {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return save(tensors, {"robuq": json.dumps(inner)})


def nested(depth: int = DEEP) -> str:
    """JSON that only nests."""
    return "[" * depth + "]" * depth


def write_model_of(path: Path, raw: bytes, **changes: Any) -> None:
    """``raw`` at ``path`` with other numbers in its header's ``model``."""
    path.write_bytes(with_header(raw, lambda inner: inner["model"].update(changes)))


# Texts that are no JSON object, or none that may be read.
BROKEN = {
    "list in list": nested(),
    "object in object": '{"a":' * DEEP,
    "zero byte": "\0",
    "nothing": "",
    "number": "7",
    "cut short": "{",
    "long number": '{"a": ' + "9" * 5000 + "}",
}
