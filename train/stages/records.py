"""What each stage of a run was made from, so that nothing goes stale in silence.

``run_dir/stages/STAGE.json`` keeps the settings and the digests of the files that a stage read, and the digests of
those it wrote. Knows no stage by name: :mod:`train.stages.run` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from robuq_core.config import StrictModel
from robuq_core.files import replacing
from train.config import TrainConfig
from train.messages import one_line
from train.state import StateError

_FOLDER = "stages"
_SHOWN = 12  # characters of a digest in messages


class Output(StrictModel):
    """A file that a stage wrote. Same size and time: taken as the same content, which saves reading gigabytes."""

    sha256: str
    bytes: int
    mtime_ns: int

    def may_be(self, path: Path) -> bool:
        status = path.stat()
        return (self.bytes, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


class Record(StrictModel):
    """Settings by dotted key and digests by file name that a stage was made from, and its files once it is done."""

    stage: str
    finished: bool
    inputs: dict[str, Any]
    outputs: dict[str, Output] = Field(default_factory=dict)


def record_path(run_dir: Path, stage: str) -> Path:
    return run_dir / _FOLDER / f"{stage}.json"


def read_record(run_dir: Path, stage: str) -> Record | None:
    """The record of ``stage``; none if it never began.

    Raises:
        StateError: it is damaged.
    """
    path = record_path(run_dir, stage)
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise StateError(f"{path}: not a readable record ({one_line(error)}); delete it, and the stage is looked at "
                         "afresh") from error  # fmt: skip


def write_record(run_dir: Path, record: Record) -> None:
    """Raises:
    StateError: it cannot be written.
    """
    path = record_path(run_dir, record.stage)
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        raise StateError(f"{path}: cannot be written ({one_line(error)}); free some space and run again") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file that some stage may have written: if its record knows it, without reading it again.

    Raises:
        StateError: it does not exist.
    """
    if not path.is_file():
        raise StateError(f"{path} does not exist: run the stage that writes it first")
    for other in sorted((path.parent / _FOLDER).glob("*.json")):
        record = read_record(path.parent, other.stem)
        known = None if record is None else record.outputs.get(path.name)
        if known is not None and known.may_be(path):
            return known.sha256
    return _sha256(path)


def describe_output(path: Path) -> Output:
    """Raises:
    OSError: the file is missing.
    """
    status = path.stat()
    return Output(sha256=_sha256(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def outputs_intact(record: Record, run_dir: Path) -> bool:
    """Whether every file that the stage wrote is there as it was written."""
    for name, output in record.outputs.items():
        path = run_dir / name
        if not path.is_file() or not (output.may_be(path) or _sha256(path) == output.sha256):
            return False
    return bool(record.outputs)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def settings_of(config: TrainConfig | Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The values of ``keys`` (a section, ``section.key`` or a top-level key) by dotted key; absent ones left out."""
    tree = config.model_dump(mode="json") if isinstance(config, TrainConfig) else config
    found: dict[str, Any] = {}
    for key in keys:
        section, _, leaf = key.partition(".")
        value = tree.get(section)
        if leaf:
            if isinstance(value, Mapping) and leaf in value:
                found[key] = value[leaf]
        elif isinstance(value, Mapping):
            found.update({f"{section}.{name}": each for name, each in value.items()})
        elif section in tree:
            found[section] = value
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every input that differs; one that the older record does not know is taken as the same."""
    return {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}


def told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``quant.rank 16 is now 8, teacher.pt is another``."""
    return ", ".join(
        f"{key} is another" if _is_digest(old) or _is_digest(new) else f"{key} {shown(old)} is now {shown(new)}"
        for key, (old, new) in changed.items()
    )


def shown(value: Any) -> str:
    """``value`` for a message: digests by their beginning, long tables cut."""
    return value[:_SHOWN] if _is_digest(value) else one_line(ValueError(str(value)), 80)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
