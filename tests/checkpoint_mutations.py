"""Faults of packed checkpoints, from a seed."""

from __future__ import annotations

import json
import random
import struct
from copy import deepcopy
from typing import Any

from crafted import Tree, join, split

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**20, 10**8, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308,
    float("nan"), float("inf"), "", "x", "x" * 100_000, "\ud800", "\0", "F64", [], [[]], [0] * 50_000,
    ["x"] * 50_000, {}, {"a": {}}, {str(i): 0 for i in range(20_000)},
)  # fmt: skip


def paths_of(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(tree, key), *paths_of(value)]
    return found


def mutate_tree(tree: Tree, pick: random.Random) -> None:
    """Replace, remove, add or double something, anywhere in ``tree``."""
    # By depth first: else nearly all of it would happen to the list of tensors.
    options = paths_of(tree)
    top = [option for option in options if option[0] is tree or (isinstance(option[0], dict) and len(option[0]) < 20)]
    container, key = pick.choice(top if pick.random() < 0.5 else options)
    match pick.randrange(4):
        case 0:
            container[key] = deepcopy(pick.choice(HOSTILE))
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[pick.choice(["x", "blocks.9.attn.qkv.trits", "depth", ""])] = deepcopy(pick.choice(HOSTILE))
        case _ if isinstance(container[key], int):
            container[key] = container[key] + pick.choice([-1, 1, 7, 2**16, 2**40])
        case _:
            container[key] = [container[key]] * pick.randrange(2, 4)


def mutated(raw: bytes, pick: random.Random) -> bytes:
    """``raw`` with one fault to three."""
    outer, body = split(raw)
    inner = json.loads(outer["__metadata__"]["robuq"])
    match pick.randrange(8):
        case 0:  # a body, or a whole file, cut short
            return raw[: pick.choice([pick.randrange(len(raw)), pick.randrange(64), len(raw) - pick.randrange(1, 64)])]
        case 1:  # bytes of the weights
            changed = bytearray(body)
            for _ in range(pick.randrange(1, 20)):
                changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
            return join(outer, bytes(changed))
        case 2:  # bytes of the header
            changed = bytearray(raw)
            for _ in range(pick.randrange(1, 20)):
                changed[8 + pick.randrange(len(raw) - len(body) - 8)] = pick.randrange(256)
            return bytes(changed)
        case 3:  # its length
            return struct.pack("<Q", pick.choice([0, 1, 2**32, 2**63, pick.randrange(2 * len(raw))])) + raw[8:]
        case 4:  # the table of the file's own tensors
            for _ in range(pick.randrange(1, 4)):
                mutate_tree(outer, pick)
            return join(outer, body)
        case 5:  # bytes too many
            return raw + bytes(pick.randrange(1, 1000))
        case _:  # the project's header
            for _ in range(pick.randrange(1, 4)):
                mutate_tree(inner, pick)
            outer["__metadata__"]["robuq"] = json.dumps(inner)
            return join(outer, body)
