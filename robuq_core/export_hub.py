"""A checkpoint as a folder to upload to the Hugging Face hub: model card, ``config.json``, the file itself."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from robuq_core.checkpoint import Header, read_checkpoint
from robuq_core.errors import UserError
from robuq_core.files import flush, publish_folder, read_json
from robuq_core.hub import CONFIG_NAME, LIBRARY_NAME, SUFFIX, is_bare_name
from robuq_core.inspection import inspect_checkpoint
from robuq_core.model_card import model_card

CARD_NAME = "README.md"

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Written by git and the hub's own tools into a folder before anything is in it.
_EMPTY = {".git", ".gitattributes", ".cache", ".huggingface"}


class ExportError(UserError):
    """A folder that cannot be made; the message names the option or the folder, and the fix."""


def export_hub(checkpoint: Path, folder: Path, *, licence: str | None = None, force: bool = False) -> Path:
    """Write ``folder`` with a copy of ``checkpoint``, verified first, ready for ``hf upload``; returns the card's path.

    Every file is whole or not there, and a folder that is new is. Other files in a former export stay.

    Args:
        licence: of the weights, by the hub's identifier; ``None`` takes ``license`` of the file's provenance.
        force: write into a folder that holds other things too.

    Raises:
        CheckpointError: the file cannot be used. ExportError: no licence, or a folder with other things in it.
    """
    header = read_checkpoint(checkpoint).header
    chosen = _licence(header, licence)
    name = checkpoint.stem + SUFFIX
    if not is_bare_name(name):
        raise ExportError(f"{checkpoint}: a name with wildcards or control characters cannot be downloaded; rename it")
    former = _former_checkpoint(folder)
    if not force and former is None and folder.exists() and not _is_empty(folder):
        raise ExportError(f"{folder}: not empty, and not a former export; give another folder, or --force")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        staging = Path(made) / "folder"
        staging.mkdir()
        shutil.copyfile(checkpoint, staging / name)
        if read_checkpoint(staging / name).header != header:
            raise ExportError(f"{checkpoint}: was changed while it was copied; export it again")
        (staging / CONFIG_NAME).write_text(json.dumps(_config(header, name), indent=2) + "\n", encoding="utf-8")
        card = model_card(inspect_checkpoint(staging / name), name, chosen)
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        _publish(staging, folder, name)
    if former is not None and former != name:
        (folder / former).unlink(missing_ok=True)
    return folder / CARD_NAME


def _publish(staging: Path, folder: Path, name: str) -> None:
    if not folder.exists():
        publish_folder(staging, folder)
        return
    # What names the others comes after them.
    for file in (name, CONFIG_NAME, CARD_NAME):
        flush(staging / file)
        (staging / file).replace(folder / file)
        flush(folder)


def _licence(header: Header, given: str | None) -> str:
    licence = given if given is not None else header.provenance.get("license")
    if licence is None:
        raise ExportError("the file does not say under which licence its weights are; give --license, such as "
                          "apache-2.0, cc-by-nc-4.0 or other (the identifiers of the Hugging Face hub)")  # fmt: skip
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        raise ExportError(f"--license {licence!r} is no identifier of the Hugging Face hub; give one such as "
                          "apache-2.0, cc-by-nc-4.0 or other")  # fmt: skip
    return licence


def _config(header: Header, name: str) -> dict[str, Any]:
    """The header without its tensors, and what finds the checkpoint."""
    return {"library_name": LIBRARY_NAME, "checkpoint": name} | header.model_dump(mode="json", exclude={"tensors"})


def _former_checkpoint(folder: Path) -> str | None:
    """The checkpoint's name in a former export; None if ``folder`` is none."""
    try:
        tree = read_json(folder / CONFIG_NAME)
        name = tree["checkpoint"] if tree["library_name"] == LIBRARY_NAME else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if is_bare_name(name) else None


def _is_empty(folder: Path) -> bool:
    if not folder.is_dir():
        raise ExportError(f"{folder}: a file; give the path of a folder")
    return all(path.name in _EMPTY for path in folder.iterdir())
