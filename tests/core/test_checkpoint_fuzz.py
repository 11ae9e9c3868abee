"""Damaged and hostile checkpoints, from a seed: each is refused with one line, at once and in little memory, or is a
model that runs."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_mutations import mutated
from crafted import Tree, with_header
from tiny import write_tiny

from robuq_core.checkpoint import read_checkpoint
from robuq_core.errors import UserError
from robuq_core.pipeline import Sampler
from robuq_core.safetensors_file import MAX_HEADER_VALUES


def run(path: Path) -> None:
    images = Sampler.from_checkpoint(path, backend="reference").generate([0], seed=0, steps=1, guidance_scale=1.0)
    assert len(images) == 1


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(path: Path) -> str:
    """The one line that refuses a file, or "" if it is read; in 1 s of CPU time and 200 MiB."""
    message, began, before = "", time.process_time(), peak_bytes()
    try:
        read_checkpoint(path)
    except UserError as error:
        message = str(error)
        assert path.name in message
        assert len(message) < 1000
        assert len(message.splitlines()) == 1
    assert time.process_time() - began < 1
    assert peak_bytes() - before < 200 * 2**20
    return message


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_mutation_is_refused_or_runs(tmp_path: Path, count: int) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    raw = path.read_bytes()
    run(path)  # what is imported and allocated once is no fault of a file
    pick, refused = random.Random(count), 0
    for _ in range(count):
        path.write_bytes(mutated(raw, pick))
        if refusal(path):
            refused += 1
        else:
            run(path)
    assert refused > 0.9 * count, "most faults are ones that nothing could live with"


@pytest.mark.parametrize(
    "fill",
    [
        lambda tree: tree.update({str(i): 0 for i in range(MAX_HEADER_VALUES // 2 - 2000)}),
        lambda tree: tree.update(class_names=[0] * (MAX_HEADER_VALUES - 5000)),
        lambda tree: tree.update(class_names=[[]] * (MAX_HEADER_VALUES // 2 - 5000)),
        lambda tree: tree["tensors"].update({str(i): {} for i in range(MAX_HEADER_VALUES // 3 - 5000)}),
        lambda tree: tree["quant"].update(bits={str(i): "x" for i in range(MAX_HEADER_VALUES // 2 - 5000)}),
        lambda tree: tree["model"].update(depth=10**4299),
    ],
)
def test_the_fullest_headers_are_refused_within_the_limits(tmp_path: Path, fill: Callable[[Tree], None]) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    assert not refusal(path)
    path.write_bytes(with_header(path.read_bytes(), fill))
    assert "header field" in refusal(path)
