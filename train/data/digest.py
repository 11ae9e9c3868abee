"""What a file or folder is: by its content, and, to save reading it again, by its names, sizes and times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of what was looked at within :func:`looked_at_once`; none outside.
_known: dict[Path, str] | None = None


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Inside, :func:`fingerprint` walks each path once: on a network disk ImageNet's files take minutes."""
    global _known
    if _known is not None:
        yield
        return
    _known = {}
    try:
        yield
    finally:
        _known = None


def data_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its sorted names with the SHA-256 of each file."""
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path)}:{data_digest(file)}\n".encode())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of the names, sizes and modification times below ``path``: alike means that nothing was touched."""
    if _known is not None and path in _known:
        return _known[path]
    digest = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.relative_to(path)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    found = digest.hexdigest()
    if _known is not None:
        _known[path] = found
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
