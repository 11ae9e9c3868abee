"""Damaged and hostile checkpoints, from a seed: each is refused with one line, at once and in little memory, or is a
model that runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoint_mutations import mutated
from crafted import Tree, with_header
from tiny import write_tiny

from robuq_core.checkpoint import read_checkpoint
from robuq_core.errors import UserError
from robuq_core.pipeline import Sampler
from robuq_core.safetensors_file import MAX_HEADER_VALUES

# Of the process's own time: other programs may have the cores.
MOST_SECONDS, MOST_BYTES = 1.0, 200 * 2**20
_STATUS = Path("/proc/self/status")


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    with suppress(OSError):  # not everywhere; the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def run(path: Path) -> None:
    images = Sampler.from_checkpoint(path, backend="reference").generate([0], seed=0, steps=1, guidance_scale=1.0)
    assert len(images) == 1


class Judge:
    """Reads files and keeps the worst figures; a file that is refused gives its message, another one ""."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    def read(self, path: Path) -> str:
        message = ""
        reset_peak()
        before = memory("VmRSS") if _STATUS.exists() else 0
        began = time.process_time()
        try:
            read_checkpoint(path)
        except UserError as error:
            message = str(error)
            assert path.name in message
            assert len(message) < 1000
            assert len(message.splitlines()) == 1
        self.seconds = max(self.seconds, time.process_time() - began)
        if _STATUS.exists():
            self.bytes = max(self.bytes, memory("VmHWM") - before)
        assert self.seconds < MOST_SECONDS
        assert self.bytes < MOST_BYTES
        return message

    def report(self) -> None:
        print(f"worst: {self.seconds:.3f} s, {self.bytes / 2**20:.1f} MiB")


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_mutation_is_refused_or_runs(tmp_path: Path, count: int) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    raw = path.read_bytes()
    run(path)  # what is imported and allocated once is no fault of a file
    pick, judge = random.Random(count), Judge()
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(raw, pick))
        if judge.read(path):
            refused += 1
        else:
            run(path)
    judge.report()
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
    judge = Judge()
    assert not judge.read(path)
    path.write_bytes(with_header(path.read_bytes(), fill))
    message = judge.read(path)
    judge.report()
    assert "header field" in message
