"""``robuq-train`` that one of its processes signals in the middle of a step: ``python signalled_training.py OPTIONS``.

``TEST_SIGNAL`` is ``STAGE STEP RANK NUMBER``: the stage's name, how many steps it has made by then, the process and the
signal. ``save`` as the stage: while the state of that step is being saved, all of its tensors already written.

Closing the log takes a while, so that what torchrun sends to the others arrives within. Python's own end aborts
one of several processes, as a thread of gloo would that still runs then.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from train import parallel, state
from train.cli import app
from train.trainer import Trainer, TrainingLog

_loss, _close, _finish = Trainer._loss, TrainingLog.close, state._Writer.finish


def _signalled_loss(trainer: Trainer, *arguments: Any) -> Any:
    stage, step, rank, number = os.environ["TEST_SIGNAL"].split()
    if (trainer.name, trainer.step, parallel.rank()) == (stage, int(step), int(rank)):
        os.kill(os.getpid(), int(number))
    return _loss(trainer, *arguments)


def _killed_finish(writer: state._Writer, **arguments: Any) -> None:
    stage, step, rank, number = os.environ["TEST_SIGNAL"].split()
    if (stage, int(step), int(rank)) == ("save", writer._state.step, parallel.rank()):
        os.kill(os.getpid(), int(number))
    _finish(writer, **arguments)


def _slow_close(log: TrainingLog) -> None:
    time.sleep(0.5)
    _close(log)


if __name__ == "__main__":
    Trainer._loss = _signalled_loss  # type: ignore[method-assign]
    state._Writer.finish = _killed_finish  # type: ignore[method-assign]
    TrainingLog.close = _slow_close  # type: ignore[method-assign]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(os.abort)
    app()
