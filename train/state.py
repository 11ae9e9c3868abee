"""States of training: weights, their moving average, AdamW's moments and the step, saved while training continues.

``RUN_DIR/states/STAGE/step-0001000/`` is one state: a safetensors file for each process that wrote it
(``torch.distributed.checkpoint``; any number of processes reads it), and ``state.json`` with everything that is small.
It is written under a hidden name, flushed and renamed: a state is whole or absent. Nothing in it can run code.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.futures import Future as TorchFuture

from robuq_core.config import StrictModel
from robuq_core.errors import UserError
from robuq_core.files import MAX_TEXT_BYTES, parse_json, publish_folder, read_json
from robuq_core.shards import read_all, read_into, stored_tensors
from train import parallel
from train.logs import one_line

_ABOUT = "state.json"


class StateError(UserError):
    """A training state that cannot be used; the message names the file and the fix."""


class EMA:
    """Exponential moving average of parameters; early on the decay is ``(1 + step) / (10 + step)``.

    ``prefix``: of its tensors in a state.
    """

    def __init__(self, model: nn.Module, decay: float, prefix: str = "ema.") -> None:
        self.decay, self.prefix = decay, prefix
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [parallel.local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(shadow, [parallel.local(p.detach()) for p in model.parameters()], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` has the averaged weights."""
        own = [parallel.local(p.detach()) for p in model.parameters()]
        kept = [value.clone() for value in own]
        with torch.no_grad():
            torch._foreach_copy_(own, [parallel.local(value) for value in self.shadow.values()])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)


def further_average(decay: float) -> str:
    """Prefix of the tensors of one of ``more_ema_decays``."""
    return f"ema-{decay:g}/"


class State(StrictModel):
    """What ``state.json`` says of the tensors beside it.

    ``finished``: no step is left to train. ``kept``: later states do not replace it. ``inputs``: what the stage was
    made from, by name. ``history``: one entry per start of the stage, as a resumed run may have another commit or
    configuration. ``files``: SHA-256 of each file of tensors.
    """

    folder: Path = Field(exclude=True)
    step: int
    finished: bool
    kept: bool = False
    inputs: dict[str, Any]
    history: list[dict[str, Any]]
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the numbers of the state, independent of the run that made it."""
        return hashlib.sha256(json.dumps([self.step, self.files], sort_keys=True).encode()).hexdigest()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare with what the state was trained with: settings that change what weights mean and not their shapes.

        Raises StateError: one differs; the message names it and both values.
        """
        for key, wanted in settings.items():
            if (found := self.inputs.get(key, wanted)) != wanted:
                raise StateError(f"{self.folder}: trained with {key} {found}, but the configuration says {wanted}; "
                                 "restore the configuration it was made with, or rerun the stage with --redo"
                                 )  # fmt: skip

    def check_files(self) -> None:
        """Compare every file with its checksum; of several processes each reads a share, and all raise alike.

        Raises StateError: a file is missing or damaged.
        """
        problem = None
        for name in sorted(self.files)[parallel.rank() :: parallel.world_size()] if parallel.is_joint() else self.files:
            file = self.folder / Path(name).name
            if not file.is_file():
                problem = f"{file}: missing; put it back"
            elif _tensors_digest(file) != self.files[name]:
                problem = f"{file}: damaged (checksum); restore it from a copy"
        if (found := parallel.any_of(problem)) is not None:
            parallel.stop_all(
                StateError(f"{found}, or delete {self.folder} to continue from an earlier state, if there is one")
            )

    def load_average(self, model: nn.Module, settings: Mapping[str, Any], decay: float | None = None) -> None:
        """Load the averaged weights into ``model``; of ``decay``, where the stage kept more averages than one.

        Raises StateError: as :meth:`check` and :meth:`check_files`, no such average, or the weights do not fit the
        model.
        """
        self.check(settings)
        self.check_files()
        prefix = "ema." if decay is None else further_average(decay)
        try:
            table = read_all(self.folder, "model.", prefix)
            if decay is not None and not any(name.startswith(prefix) for name in table):
                raise StateError(f"{self.folder}: holds no average of decay {decay:g}; choose one of the stage's "
                                 "more_ema_decays, or omit --ema")  # fmt: skip
            buffers = {name.removeprefix("model."): value for name, value in table.items() if name[0] == "m"}
            average = {name.removeprefix(prefix): value for name, value in table.items() if name[0] == "e"}
            # Nothing is stored of parameters without elements, such as a low-rank branch of rank 0.
            empty = {name: p for name, p in model.state_dict().items() if not p.numel()}
            model.load_state_dict({**empty, **buffers, **average})
        except (RuntimeError, ValueError) as error:
            raise StateError(f"{self.folder}: weights do not fit the configured model ({one_line(error)})") from error

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors``, which must be all of the state's, each process its own parts of them.

        Raises StateError: as :meth:`check_files`. ValueError: other names or shapes.
        """
        self.check_files()
        stored, wanted = stored_tensors(self.folder), _with_elements(tensors)
        for name in sorted(stored.keys() ^ wanted.keys()):
            raise ValueError(f"{name} is only in the {'state' if name in stored else 'configured model'}")
        for name, tensor in wanted.items():
            if stored[name].size != tensor.shape:
                raise ValueError(f"{name} is {tuple(stored[name].size)}, not {tuple(tensor.shape)}")
        read_into(self.folder, wanted)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensors_digest(path: Path) -> str:
    """SHA-256 of a safetensors file, whatever order its header is written in: that varies."""
    with path.open("rb") as stream:
        try:
            header = parse_json(stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_TEXT_BYTES)))
        except ValueError:
            return "damaged"
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_state(folder: Path) -> State:
    """Describe the state in ``folder`` (``step-...``). Raises StateError: it is missing, damaged or of another kind."""
    try:
        return State(folder=folder, **read_json(folder / _ABOUT))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StateError(f"{folder}: not a training state; give a folder RUN_DIR/states/STAGE/step-...") from error
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise StateError(f"{folder / _ABOUT}: not the description of a training state ({one_line(error)}); delete "
                         f"{folder} to continue from an earlier state, if there is one") from error  # fmt: skip


def find_state(states: Path) -> State | None:
    """The state of the most steps below ``states``, which is ``RUN_DIR/states/STAGE``; none if there is none.

    Raises StateError: it is damaged, or of a version that kept states in single files.
    """
    folders = [path for path in states.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    if folders:
        return read_state(max(folders, key=lambda path: int(path.name.removeprefix("step-"))))
    old = states.parent.parent / f"{states.name}.pt"
    if old.exists():
        raise StateError(f"{old}: a state of an earlier version, which this one does not resume; finish the stage with "
                         f"that version, or move the file away to train again (teacher.pretrained={old.name} imports "
                         "the weights of a teacher)")  # fmt: skip
    return None


def latest_state(states: Path) -> State:
    """As :func:`find_state`. Raises StateError: there is none."""
    if (state := find_state(states)) is None:
        raise StateError(f"{states} does not exist: run the stage that writes it first")
    return state


def _with_elements(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


class _Writer(HuggingFaceStorageWriter):
    """Writes this process's tensors; once all processes have, the first one publishes the state."""

    def __init__(self, state: State) -> None:
        self._state, self._hidden = state, state.folder.with_name(f".{state.folder.name}")
        super().__init__(str(self._hidden), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[Any]]:
        """Hands the digest of the file that it wrote to :meth:`finish`."""
        super().write_data(plan, planner).wait()
        own = self._hidden.glob(f"shard-{plan.storage_data['shard_index']:05d}-*")
        done: TorchFuture[list[Any]] = TorchFuture()
        done.set_result([(file.name, _tensors_digest(file)) for file in own])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        self._state.files.update(pair for each in results for pair in each)
        (self._hidden / _ABOUT).write_text(self._state.model_dump_json(indent=1) + "\n")
        if self._state.folder.exists():
            _remove(self._state.folder)
        publish_folder(self._hidden, self._state.folder)
        for other in self._state.folder.parent.glob("step-*"):
            if other != self._state.folder and not read_state(other).kept:
                _remove(other)


class Saver:
    """Writes the states of one stage while training continues, one at a time; every process calls it alike.

    Raises StateError: from either method, when a state could not be written; the one before it is whole.
    """

    def __init__(self) -> None:
        self._writing: tuple[State, Future[Any]] | None = None

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` to host memory and start writing them to ``state.folder``, after the state before."""
        self.wait()
        parallel.on_first(lambda: _remove_hidden(state.folder.parent))
        alone = not parallel.is_joint()
        group = None if alone else parallel.saving_group()
        writer = _Writer(state)
        started = async_save(_with_elements(tensors), storage_writer=writer, process_group=group, no_dist=alone)
        self._writing = state, cast("Future[Any]", started)

    def wait(self) -> None:
        """Return when the state that is being written is on the disk."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        state, future = writing
        try:
            future.result()
        except (CheckpointException, OSError) as error:  # the same in every process
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if not isinstance(cause, OSError):
                raise cause from error
            parallel.on_first(lambda: _remove_hidden(state.folder.parent))  # which also frees its space
            message = f"{state.folder}: cannot write the training state ({one_line(cause)}); the one before is intact: "
            parallel.stop_all(StateError(message + "free some space and run again"))


def _remove(state: Path) -> None:
    """Hide the state at once, then delete it: a run that is killed meanwhile leaves nothing that looks like a state."""
    hidden = state.with_name(f".{state.name}-removed")
    state.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_hidden(states: Path) -> None:
    for left_over in states.glob(".step-*"):
        shutil.rmtree(left_over)


@contextmanager
def exclusive(states: Path) -> Iterator[None]:
    """Keep ``RUN_DIR/states/STAGE`` to this run: two runs of one stage would overwrite each other's steps.

    Raises StateError: another process holds it, or its folder cannot be made.
    """
    with ExitStack() as stack:
        parallel.on_first(lambda: stack.enter_context(locked(states)))
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``PATH.lock``. Raises: StateError: another process does, or the folder cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise StateError(f"run_dir {path.parent}: cannot be written to ({error})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(
                f"{path}: another process trains this stage; wait for it, or choose another run_dir"
            ) from error
        yield
