"""Where a checkpoint comes from: a file, a folder that holds one, an id of the Hugging Face hub, or the package itself,
by the names of :data:`BUNDLED`.

A folder of the hub is what ``robuq export-hub`` makes: its ``config.json`` names the checkpoint, so that nothing else
is downloaded, least of all from a repository that holds something else.
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

# Names of the checkpoints that come with the package, the default first, and their files.
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
    """Path of the checkpoint that comes with the package as ``name``, a key of :data:`BUNDLED`; none is the first.

    Raises:
        KeyError: no checkpoint has that name.
    """
    chosen = next(iter(BUNDLED)) if name is None else name
    return Path(str(resources.files("robuq_core") / "assets" / BUNDLED[chosen]))


def resolve_checkpoint(
    source: Path | str | None,
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The packed file that ``source`` means.

    Args:
        source: a file; a folder with exactly one packed file; a name of :data:`BUNDLED`; ``owner/name`` or
            ``owner/name@revision`` on the hub, downloaded at the first time; ``None`` for the default of the package.
            What exists here is never looked for elsewhere.
        revision, cache_dir, token, local_files_only: of a hub id, as ``huggingface_hub.snapshot_download`` takes them.

    Raises:
        CheckpointError: there is no such file, folder or repository, it holds none or several, or the hub cannot be
            reached. Whether the file itself is whole shows when it is read.
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
        return path  # who reads it tells if it is missing
    return _downloaded(match["repo"], revision or match["revision"], cache_dir, token, local_files_only)


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


def _downloaded(
    repo: str, revision: str | None, cache_dir: Path | str | None, token: str | bool | None, local_files_only: bool
) -> Path:
    library = _huggingface_hub(repo)

    def snapshot(patterns: Sequence[str], revision: str | None) -> Path:
        try:
            folder = library.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        except Exception as error:  # those of whatever network library it uses, too
            raise CheckpointError(_failure(repo, revision, error)) from error
        return Path(folder)

    folder = snapshot([CONFIG_NAME], revision)
    name = _checkpoint_name(repo, folder / CONFIG_NAME)
    # Of the commit that the first call met, whoever uploads meanwhile: snapshots are folders named by it.
    path = snapshot([CONFIG_NAME, name, f"{DECODER_FOLDER}/*"], folder.name) / name
    if not path.is_file():
        raise CheckpointError(f"{repo}: {CONFIG_NAME} names {name}, which is not in the repository; "
                              "its owner should upload the whole folder that robuq export-hub wrote")  # fmt: skip
    return path


def _checkpoint_name(repo: str, config: Path) -> str:
    try:
        tree: Any = read_json(config)
        library, name = tree["library_name"], tree["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        library = name = None
    if library != LIBRARY_NAME or not is_bare_name(name):
        raise CheckpointError(f"{repo}: not a RobuQ checkpoint (its {CONFIG_NAME} is not one of robuq export-hub); "
                              "give another repository, or convert the weights first")  # fmt: skip
    return name


def is_bare_name(name: object) -> TypeGuard[str]:
    """Whether ``name``, which a stranger wrote, is that of a checkpoint: it must not lead out of its folder, nor be a
    pattern of many files."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith(SUFFIX)
        and name.isprintable()
        and not set(name) & set("*?[]\\:")
    )


def _huggingface_hub(repo: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise CheckpointError(f"{repo}: no such file or folder here, and the hub takes the package huggingface_hub; "
                              "from a checkout: pip install '.[hub]'") from error  # fmt: skip


def _failure(repo: str, revision: str | None, error: Exception) -> str:
    errors: Any = importlib.import_module("huggingface_hub.errors")
    where = f"{repo}@{revision}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return f"{where}: the hub lets only approved accounts in; ask for access on its page and run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"{where}: no such file or folder here and no such repository on the hub; "
                "check the spelling, or run hf auth login if it is private")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where}: the repository has no such revision; give a branch, tag or commit that its page lists"
    if isinstance(error, errors.HFValidationError):
        return f"{where}: no such file or folder here, and no valid id of the hub; check the spelling"
    # A token that is out of date, or a mirror that does not say what it means.
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"{where}: no such file or folder here, and the hub refuses access; run hf auth login, or check HF_TOKEN"
    return (f"{where}: no such file or folder here, and the hub cannot be reached nor is it in the cache "
            f"({type(error).__name__}); go online once, or give a local path")  # fmt: skip
