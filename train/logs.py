"""What a run says: records of its stages (lines of JSON, TensorBoard, Weights & Biases), bars, quoted errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from robuq_core.errors import UserError
from robuq_core.files import parse_json, replacing

Item = TypeVar("Item")

_FLUSH_SECONDS = 10


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of ``error``, as other messages quote it: on one line, cut to ``most`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def tracked(items: Collection[Item], description: str) -> Iterator[Iterator[Item]]:
    """``items`` one by one beside a bar, which ends with the block.

    A plain ``track`` whose loop fails is left to the garbage collector; where that happens to run in another bar's
    thread, the two bars wait for each other for ever.
    """
    with closing(cast(Generator[Item, None, None], track(items, description))) as bar:
        yield bar


class TrainingLog:
    """The records of stage ``name`` in ``run_dir``: ``STAGE.log.jsonl``, ``tensorboard/STAGE``, and the project
    ``wandb`` of Weights & Biases, if one is given.

    Where standard output is no terminal, every record is also a plain line there: a bar would show nothing.

    Records of steps after ``step``, the saved one, are dropped: a killed run logged them and this one takes those
    steps again.
    """

    def __init__(self, run_dir: Path, name: str, step: int, steps: int, wandb: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._path, self._name, self._steps = run_dir / f"{name}.log.jsonl", name, steps
        self._forget_after(step)
        self._wandb = None if wandb is None else _wandb_run(wandb, run_dir, name)
        folder = run_dir / "tensorboard" / name
        self._curves = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=_FLUSH_SECONDS)

    def write(self, step: int, **values: float) -> None:
        """Add ``values`` of ``step``, rounded to six significant digits."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in values.items():
            self._curves.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"training_step": step, **values})
        if not is_terminal():
            print(f"{self._name} {step}/{self._steps}", *self._shown(step, rounded), flush=True)

    def _shown(self, step: int, values: dict[str, float]) -> Iterator[str]:
        for name, value in values.items():
            yield f"{name} {value:.4g}"
        if rate := values.get("steps_per_second"):
            yield f"left {timedelta(seconds=round((self._steps - step) / rate))}"

    def close(self) -> None:
        self._curves.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _forget_after(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines()
        kept = [line for line in lines if _logged_step(line) <= step]
        if kept != lines:
            with replacing(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))


def _wandb_run(project: str, run_dir: Path, name: str) -> Any:
    """The run of stage ``name`` on Weights & Biases, the same one after a restart.

    Raises UserError: the package is missing, or refuses.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"wandb: the package is not installed ({error}); pip install wandb, or remove the key"
        ) from error
    kept = run_dir / f"{name}.wandb"
    known = kept.read_text().strip() if kept.exists() else None
    try:
        run = wandb.init(project=project, name=f"{run_dir.name} {name}", id=known, resume="allow", dir=run_dir)
    except Exception as error:  # of its own, by version
        raise UserError(f"wandb: cannot start a run ({one_line(error)}); set WANDB_MODE=offline, or remove the key"
                        ) from error  # fmt: skip
    kept.write_text(run.id)
    run.define_metric("*", step_metric="training_step")  # steps since the last saved state come again after a kill
    return run


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
