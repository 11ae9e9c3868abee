"""The order of the stages, and what is done, gone on with, made again or left alone.

A stage whose record says that it was made from what is there now is left alone. A short one that was not is made
again; a long one, that trains, is gone on with where only its schedule changed, and otherwise refused with the way out.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from robuq_core.files import replacing
from train.config import TrainConfig
from train.data import prepare
from train.messages import one_line
from train.parallel import from_first, on_first
from train.stages.models import read_class_names
from train.stages.records import (
    Record,
    changes,
    describe_output,
    file_digest,
    outputs_intact,
    read_record,
    record_path,
    settings_of,
    shown,
    told,
    write_record,
)
from train.stages.steps import BY_NAME, STAGES, Note, Stage, export, is_packable
from train.state import StateError, load_state, locked
from train.state_shards import shards_folder

# Keys of a training stage that do not change its numbers beyond rounding, or whose file's content is compared instead.
_IDLE = {"save_every", "keep_every", "log_every", "eval_every", "eval_samples", "accumulate",
         "activation_checkpointing", "parallel", "pretrained", "warm_start"}  # fmt: skip

Changed = dict[str, tuple[Any, Any]]


def reason_to_skip(stage: Stage, config: TrainConfig) -> str | None:
    """Why ``config`` does not call for ``stage``, if it does not; the search for bits is one switch."""
    searched = config.allocate.average_bits is not None
    warm = (searched and config.sensitivity.after == "warmup") or config.qat.warm_start == "warmup"
    if stage.name in ("sensitivity", "allocate") and not searched:
        return "allocate.average_bits is null: every layer has quant.activation_bits"
    if stage.name == "warmup" and not warm:
        return "nothing starts from it"
    if stage.name == "export" and not is_packable(config):
        return f"the packed runtime does not know quant.activation {config.quant.activation}"
    return None


def run(config: TrainConfig, note: Note = print, redo: Collection[str] = ()) -> None:
    """Every stage that ``config`` calls for, in order; those that are up to date are left alone.

    Args:
        redo: stages to make again, with all that follow the first of them.

    Raises:
        UserError: the first stage that cannot be done; those before it are kept.
    """
    read_class_names(config)
    run_prepare(config, note)
    again = False
    for stage in STAGES:
        again = again or stage.name in redo
        reason = reason_to_skip(stage, config)
        if reason is None:
            execute(stage, config, note, redo=again)
        else:
            on_first(partial(note, f"{stage.name}: left out, as {reason}"))


def run_prepare(config: TrainConfig, note: Note = print, verify: bool = False) -> None:
    """The first stage on its own; says so if there was nothing to do."""
    said: list[str] = []

    def listen(message: str) -> None:
        said.append(message)
        note(message)

    index = prepare(config, listen, verify)
    on_first(lambda: _keep_config(config))
    # Only the first process has heard anything.
    if from_first(lambda: not said):
        on_first(lambda: note(f"prepare: up to date ({index.count} {index.kind} in {len(index.shards)} shards)"))


def run_stage(name: str, config: TrainConfig, note: Note = print, redo: bool = False) -> None:
    """One stage on its own, from what the stages before it have left.

    Raises:
        StateError: what they left is not of one piece. UserError: the stage's own.
    """
    stage = BY_NAME[name]
    on_first(lambda: check_lineage(stage, config))
    execute(stage, config, note, redo)


def export_to(config: TrainConfig, path: Path) -> None:
    """Pack the student into ``path``, which the run folder keeps no record of.

    Raises:
        StateError: as :func:`run_stage`.
    """
    check_lineage(BY_NAME["export"], config)
    export(config, path)


def execute(stage: Stage, config: TrainConfig, note: Note = print, redo: bool = False) -> None:
    """Bring the output of ``stage`` up to date with ``config`` and the run folder."""
    read_class_names(config)
    config = stage.resolve(config)
    inputs = stage.inputs(config, note)
    if not from_first(lambda: _begin(stage, config, inputs, note, redo)):
        return
    if stage.trains or stage.together:
        stage.work(config, note)
    else:
        on_first(lambda: _work_alone(stage, config, note))
    on_first(lambda: _finish(stage, config, inputs))


def _work_alone(stage: Stage, config: TrainConfig, note: Note) -> None:
    try:
        stage.work(config, note)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{stage.output(config)}: cannot be written ({one_line(error)}); free some space and run "
                         "again") from error  # fmt: skip


def _finish(stage: Stage, config: TrainConfig, inputs: dict[str, Any]) -> None:
    outputs = {stage.writes: describe_output(stage.output(config))}
    write_record(config.run_dir, Record(stage=stage.name, finished=True, inputs=inputs, outputs=outputs))


def _begin(stage: Stage, config: TrainConfig, inputs: dict[str, Any], note: Note, redo: bool) -> bool:
    """Whether there is work to do; if there is, its record has been opened."""
    path = stage.output(config)
    if redo:
        _forget(stage, config)
        note(f"{stage.name}: made again, as asked")
    record = read_record(config.run_dir, stage.name)
    if not path.exists():
        record = None  # deleted by hand, as messages advise: a new start
    adopted = record is None and stage.trains and path.exists()
    if adopted:
        record = _adopted(stage, config, inputs, note)
    if record is not None:
        changed = {key: pair for key, pair in changes(record.inputs, inputs).items() if _matters(key)}
        finished = record.finished and outputs_intact(record, config.run_dir)
        if finished and not changed:
            note(f"{stage.name}: up to date ({path.name})")
            if adopted:
                write_record(config.run_dir, record)
            return False
        if stage.trains:
            _check_continuation(stage, path, changed, finished)
        if changed:
            note(f"{stage.name}: {'goes on' if stage.trains else 'made again'}, as {told(changed)}")
        elif record.finished:
            note(f"{stage.name}: looked at again, as {path.name} is not the file that it wrote")
    _keep_config(config)
    write_record(config.run_dir, Record(stage=stage.name, finished=False, inputs=inputs))
    return True


def _check_continuation(stage: Stage, path: Path, changed: Changed, finished: bool) -> None:
    """Raises:
    StateError: what changed is more than the schedule, or the stage is finished and asks for no more steps.
    """
    own = {key for key in changed if key == "precision" or key.startswith(f"{stage.name}.")}
    before, now = changed.get(f"{stage.name}.steps", (0, 0))
    bad = {key: pair for key, pair in changed.items() if key not in own or (finished and now <= before)}
    if bad:
        old = ", ".join(f"{key} {shown(pair[0])}" for key, pair in bad.items())
        new = ", ".join(shown(pair[1]) for pair in bad.values())
        raise StateError(f"{path}: trained with {old}, but the configuration says {new}; restore the configuration it "
                         f"was made with, or start the stage again with robuq-train {stage.name} --redo")  # fmt: skip


def _matters(key: str) -> bool:
    return key.startswith("content of ") or key.partition(".")[2] not in _IDLE


def _adopted(stage: Stage, config: TrainConfig, inputs: Mapping[str, Any], note: Note) -> Record:
    """The record of a state that lacks one, from the history in the state itself; its parents are taken on trust."""
    path = stage.output(config)
    state = load_state(path)
    start = state["history"][-1] if state["history"] else {}
    known = settings_of(start.get("config", {}), *stage.settings(config))
    if config.data.path.is_file() and "sha256" in start.get("data", {}):
        known["content of data.path"] = start["data"]["sha256"]
    steps = start.get("config", {}).get(stage.name, {}).get("steps", 0)
    note(f"{stage.name}: {path.name} has no record; its own history stands for one")
    outputs = {path.name: describe_output(path)}
    merged = {**{key: inputs[key] for key in inputs if key not in known}, **known}
    return Record(stage=stage.name, finished=state["step"] >= steps, inputs=merged, outputs=outputs)


def _forget(stage: Stage, config: TrainConfig) -> None:
    """Remove what ``stage`` has made, unless another process is at it."""
    path = stage.output(config)
    with locked(path) if stage.trains else nullcontext():
        for file in (path, record_path(config.run_dir, stage.name), path.with_suffix(".log.jsonl")):
            file.unlink(missing_ok=True)
        for folder in (shards_folder(path), config.run_dir / "tensorboard" / stage.name):
            shutil.rmtree(folder, ignore_errors=True)


def check_lineage(stage: Stage, config: TrainConfig) -> None:
    """That every file that ``stage`` stands on was made from the files that are there now.

    Raises:
        StateError: one was made from another file; the message names the stage to run.
    """
    makers = {each.writes: each for each in STAGES}
    pending, seen = [path.name for path in stage.reads(config)], set[str]()
    while pending:
        name = pending.pop()
        maker = makers.get(name)
        if maker is None or name in seen:
            continue
        seen.add(name)
        record = read_record(config.run_dir, maker.name)
        for path in maker.reads(config):
            pending.append(path.name)
            made_from = None if record is None else record.inputs.get(path.name)
            if made_from is not None and path.exists() and made_from != file_digest(path):
                raise StateError(f"{config.run_dir / name}: made from another {path.name} than the one there now; run "
                                 f"robuq-train {maker.name} --redo first")  # fmt: skip


def _keep_config(config: TrainConfig) -> None:
    """The resolved configuration, beside what it made; its history is in the states."""
    path = config.run_dir / "config.yaml"
    text = "# What this folder was last made with, every key spelled out.\n"
    text += yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
    try:
        if not path.exists() or path.read_text() != text:
            with replacing(path) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise StateError(f"run_dir {config.run_dir}: cannot be written to ({error})") from error
