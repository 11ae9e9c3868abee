"""Where a checkpoint comes from: a file, a folder, an id of the Hugging Face hub, or a name in :data:`BUNDLED`.

The ``config.json`` that ``robuq export-hub`` writes names the checkpoint in a hub repository, so that nothing else is
downloaded, and nothing at all from other repositories.
What cannot be found or downloaded raises :class:`CheckpointError`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from robuq_core.checkpoint import CheckpointError, read_header
from robuq_core.files import read_json

# Checkpoints of the package by name; the first is the default.
BUNDLED = {
    "imagenet": "imagenet-1-per-class-w1.58a2.safetensors",
    "glyphs": "glyphs-w1.58a2.safetensors",
}
SUFFIX = ".safetensors"
CONFIG_NAME = "config.json"
LIBRARY_NAME = "robuq"
DECODER_FOLDER = "vae"

# owner/name or owner/name@revision
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def bundled_checkpoint(name: str | None = None) -> Path:
    """Path of the bundled checkpoint ``name``, a key of :data:`BUNDLED`; default: the first."""
    chosen = next(iter(BUNDLED)) if name is None else name
    return Path(str(resources.files("robuq_core") / "assets" / BUNDLED[chosen]))


def resolve_checkpoint(source: Path | str | None) -> Path:
    """The path of the packed file that ``source`` means.

    Args:
        source: a file; a folder with exactly one packed file; a name in :data:`BUNDLED`; ``owner/name`` or
            ``owner/name@revision`` on the hub, downloaded once; ``None``: the default bundled checkpoint. Existing
            local paths come first. The file itself is checked when it is read.
    """
    if source is None:
        return bundled_checkpoint()
    path = Path(source)
    if path.is_dir():
        return _only_checkpoint(path)
    if str(source) in BUNDLED and not path.exists():
        return bundled_checkpoint(str(source))
    match = _HUB_ID.fullmatch(str(source))
    if path.exists() or match is None or str(source).endswith(SUFFIX):
        return path
    return _downloaded(match["repo"], match["revision"])


def _only_checkpoint(folder: Path) -> Path:
    found = sorted(folder.glob("*" + SUFFIX))
    packed, fault = [], None
    for path in found:
        try:
            read_header(path)
            packed.append(path)
        except CheckpointError as error:
            fault = error
    if len(packed) == 1:
        return packed[0]
    if packed:
        names = ", ".join(path.name for path in packed)
        raise CheckpointError(f"{folder}: holds several packed checkpoints ({names}); give the path of one")
    if fault is not None and len(found) == 1:
        raise fault
    raise CheckpointError(f"{folder}: no packed {SUFFIX} checkpoint in this folder; give the path of one")


def _downloaded(repo: str, revision: str | None) -> Path:
    try:
        library: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise CheckpointError(f"{repo}: no such file or folder, and the hub needs the package huggingface_hub; "
                              "from a checkout: pip install '.[hub]'") from error  # fmt: skip

    def snapshot(patterns: Sequence[str], revision: str | None) -> Path:
        try:
            return Path(library.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # also those of its network library
            raise CheckpointError(_failure(repo, revision, error)) from error

    folder = snapshot([CONFIG_NAME], revision)
    name = exported_checkpoint(folder / CONFIG_NAME)
    if name is None:
        raise CheckpointError(f"{repo}: not a RobuQ checkpoint (its {CONFIG_NAME} is not one of robuq export-hub); "
                              "give another repository, or convert the weights first")  # fmt: skip
    # Snapshot folders are named by commit: the second download is of the same one, whatever was uploaded meanwhile.
    path = snapshot([CONFIG_NAME, name, f"{DECODER_FOLDER}/*"], folder.name) / name
    if not path.is_file():
        raise CheckpointError(f"{repo}: {CONFIG_NAME} names {name}, which is not in the repository; "
                              "its owner should upload the whole folder that robuq export-hub wrote")  # fmt: skip
    return path


def exported_checkpoint(config: Path) -> str | None:
    """The checkpoint that a ``config.json`` of ``robuq export-hub`` names; None for other and unreadable files."""
    try:
        tree: Any = read_json(config)
        name = tree["checkpoint"] if tree["library_name"] == LIBRARY_NAME else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if is_bare_name(name) else None


def is_bare_name(name: object) -> TypeGuard[str]:
    """Whether an untrusted ``name`` is a file name of a checkpoint: no path and no wildcards."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith(SUFFIX)
        and name.isprintable()
        and not set(name) & set("*?[]\\:")
    )


def _failure(repo: str, revision: str | None, error: Exception) -> str:
    where = f"{repo}@{revision}" if revision else repo
    absent = "no such file or folder, and"
    reasons = {
        "GatedRepoError": "the hub only serves approved accounts; request access on its page and run hf auth login",
        "RepositoryNotFoundError": f"{absent} no such repository on the hub; check the spelling, or run hf auth login "
                                   "if it is private",
        "RevisionNotFoundError": "the repository has no such revision; give a branch, tag or commit of its page",
        "HFValidationError": f"{absent} not a valid hub id; check the spelling",
    }  # fmt: skip
    kind = type(error).__name__
    # An expired token, or a mirror with imprecise errors.
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    if kind not in reasons and refused:
        return f"{where}: {absent} the hub refuses access; run hf auth login, or check HF_TOKEN"
    unreachable = (
        f"{absent} the hub cannot be reached nor is it in the cache ({kind}); go online once, or give a local path"
    )
    return f"{where}: {reasons.get(kind, unreachable)}"
