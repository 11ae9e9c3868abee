"""What a file or folder is: by its content, and, to save reading it again, by its names, sizes and times."""

from __future__ import annotations

import hashlib
from pathlib import Path


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
    digest = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.relative_to(path)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
