"""A checkpoint as a folder to upload to the Hugging Face hub: model card, ``config.json``, the file itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from robuq_core.checkpoint import read_checkpoint
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.hub import CONFIG_NAME, LIBRARY_NAME, SUFFIX, exported_checkpoint, is_bare_name
from robuq_core.inspection import inspect_checkpoint
from robuq_core.model_card import model_card

CARD_NAME = "README.md"

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Left by git and the hub's tools in an otherwise empty folder.
_EMPTY = {".git", ".gitattributes", ".cache", ".huggingface"}


class ExportError(UserError):
    """A folder that cannot be written; the message names the option or the folder, and the fix."""


def export_hub(checkpoint: Path, folder: Path, *, licence: str | None = None) -> Path:
    """Write ``folder`` with a verified copy of ``checkpoint``, ready for ``hf upload``; returns the card's path.

    A former export is replaced, file by file; other files in it stay. A checkpoint that cannot be used raises
    CheckpointError, a folder with other files ExportError.

    Args:
        licence: of the weights, by the hub's identifier; ``None``: ``license`` of the file's provenance.
    """
    header = read_checkpoint(checkpoint).header
    chosen = licence if licence is not None else header.provenance.get("license")
    if not isinstance(chosen, str) or not _LICENCE.fullmatch(chosen):
        raise ExportError(f"{chosen!r} is not a licence of the weights; give --license, such as apache-2.0, "
                          "cc-by-nc-4.0 or other (the identifiers of the Hugging Face hub)")  # fmt: skip
    name = checkpoint.stem + SUFFIX
    if not is_bare_name(name):
        raise ExportError(f"{checkpoint}: a name with wildcards or control characters cannot be downloaded; rename it")
    former = exported_checkpoint(folder / CONFIG_NAME)
    if former is None and folder.exists() and (folder.is_file() or {each.name for each in folder.iterdir()} - _EMPTY):
        raise ExportError(f"{folder}: not an empty folder, and not a former export; give another folder")
    about = {"library_name": LIBRARY_NAME, "checkpoint": name} | header.model_dump(mode="json", exclude={"tensors"})
    card = model_card(inspect_checkpoint(checkpoint), name, chosen)
    with replacing(folder / name) as part:
        shutil.copyfile(checkpoint, part)
        if read_checkpoint(part).header != header:
            raise ExportError(f"{checkpoint}: was changed while it was copied; export it again")
    for file, text in ((CONFIG_NAME, json.dumps(about, indent=2) + "\n"), (CARD_NAME, card)):
        with replacing(folder / file) as part:
            part.write_text(text, encoding="utf-8")
    if former is not None and former != name:
        (folder / former).unlink(missing_ok=True)
    return folder / CARD_NAME
