"""What a stage logs of its training: lines of JSON beside its state, curves for TensorBoard, progress on the screen."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from robuq_core.files import parse_json, replacing

_FLUSH_SECONDS = 10


class TrainingLog:
    """The records of stage ``name`` in ``run_dir``: ``STAGE.log.jsonl`` and ``tensorboard/STAGE``.

    Where standard output is no terminal, every record is also a plain line there: a bar would show nothing.

    Records of steps after ``step``, the saved one, are dropped: a killed run logged them and this one takes those
    steps again.
    """

    def __init__(self, run_dir: Path, name: str, step: int, steps: int) -> None:
        self._path, self._name, self._steps = run_dir / f"{name}.log.jsonl", name, steps
        self._forget_after(step)
        folder = run_dir / "tensorboard" / name
        self._curves = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=_FLUSH_SECONDS)

    def write(self, step: int, **values: float) -> None:
        """Add ``values`` of ``step``, rounded to six significant digits."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in values.items():
            self._curves.add_scalar(name, value, step)
        if not is_terminal():
            print(f"{self._name} {step}/{self._steps}", *self._shown(step, rounded), flush=True)

    def _shown(self, step: int, values: dict[str, float]) -> Iterator[str]:
        for name, value in values.items():
            yield f"{name} {value:.4g}"
        if rate := values.get("steps_per_second"):
            yield f"left {timedelta(seconds=round((self._steps - step) / rate))}"

    def close(self) -> None:
        self._curves.close()

    def _forget_after(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines()
        kept = [line for line in lines if _logged_step(line) <= step]
        if kept != lines:
            with replacing(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def progress_bar(log: TrainingLog | None) -> Progress:
    """A bar of steps with the time to go; hidden without a ``log`` (not the first process) or a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=log is None or not is_terminal())


def _logged_step(line: str) -> float:
    """The step of a record; infinite for a line that a kill cut short."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
