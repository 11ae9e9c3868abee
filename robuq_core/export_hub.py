"""A checkpoint as a folder to upload to the Hugging Face hub: model card, ``config.json``, the file itself."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from robuq_core.checkpoint import Header, read_checkpoint
from robuq_core.errors import UserError
from robuq_core.files import flush, publish_folder, read_json
from robuq_core.hub import CONFIG_NAME, LIBRARY_NAME, SUFFIX, is_bare_name
from robuq_core.inspection import inspect_checkpoint
from robuq_core.model_card import model_card

CARD_NAME = "README.md"

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Left by git and the hub's tools in an otherwise empty folder.
_EMPTY = {".git", ".gitattributes", ".cache", ".huggingface"}


class ExportError(UserError):
    """A folder that cannot be written; the message names the option or the folder, and the fix."""


def export_hub(checkpoint: Path, folder: Path, *, licence: str | None = None, force: bool = False) -> Path:
    """Write ``folder`` with a verified copy of ``checkpoint``, ready for ``hf upload``; returns the card's path.

    A new folder is written atomically, an existing one file by file. A former export is replaced, other files stay.

    Args:
        licence: of the weights, by the hub's identifier; ``None``: ``license`` of the file's provenance.
        force: write into a folder that contains other files.

    Raises:
        CheckpointError: the file cannot be used. ExportError: no licence, or a folder with other files.
    """
    header = read_checkpoint(checkpoint).header
    chosen = _licence(header, licence)
    name = checkpoint.stem + SUFFIX
    if not is_bare_name(name):
        raise ExportError(f"{checkpoint}: a name with wildcards or control characters cannot be downloaded; rename it")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: a file; give the path of a folder")
    former = _former_checkpoint(folder)
    is_empty = not folder.exists() or all(path.name in _EMPTY for path in folder.iterdir())
    if not force and former is None and not is_empty:
        raise ExportError(f"{folder}: not empty, and not a former export; give another folder, or --force")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        staging = Path(made) / "folder"
        staging.mkdir()
        shutil.copyfile(checkpoint, staging / name)
        if read_checkpoint(staging / name).header != header:
            raise ExportError(f"{checkpoint}: was changed while it was copied; export it again")
        about = {"library_name": LIBRARY_NAME, "checkpoint": name} | header.model_dump(mode="json", exclude={"tensors"})
        (staging / CONFIG_NAME).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        card = model_card(inspect_checkpoint(staging / name), name, chosen)
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        if not folder.exists():
            publish_folder(staging, folder)
        else:
            for file in (name, CONFIG_NAME, CARD_NAME):  # each names the one before it
                flush(staging / file)
                (staging / file).replace(folder / file)
                flush(folder)
    if former is not None and former != name:
        (folder / former).unlink(missing_ok=True)
    return folder / CARD_NAME


def _licence(header: Header, chosen: str | None) -> str:
    licence = chosen if chosen is not None else header.provenance.get("license")
    if licence is None:
        raise ExportError("the file does not record the licence of its weights; give --license, such as "
                          "apache-2.0, cc-by-nc-4.0 or other (the identifiers of the Hugging Face hub)")  # fmt: skip
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        raise ExportError(f"--license {licence!r} is no identifier of the Hugging Face hub; give one such as "
                          "apache-2.0, cc-by-nc-4.0 or other")  # fmt: skip
    return licence


def _former_checkpoint(folder: Path) -> str | None:
    """The checkpoint's name in a former export; None for other folders."""
    try:
        tree = read_json(folder / CONFIG_NAME)
        name = tree["checkpoint"] if tree["library_name"] == LIBRARY_NAME else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if is_bare_name(name) else None
