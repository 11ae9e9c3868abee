"""Atomic writes (temporary file or folder, fsync, rename), and small untrusted files read within limits."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The largest in use, an index of shards, has a few hundred kB.
MAX_TEXT_BYTES = 16 * 2**20

# fsync of a folder fails on some network file systems, and without permission to read it.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary path in the folder of ``path``; renamed over it if the block succeeds, removed if it fails.

    The content is on disk before the rename, and the rename before the function returns.

    Args:
        mode: permissions of the file; default: read and write for all, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode) if mode is None else mode
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(permissions)  # a library may have recreated the file
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(staging: Path, folder: Path) -> None:
    """Rename ``staging``, a finished folder, to ``folder`` beside it, which must not exist or be empty.

    Its content is on disk before the rename, and the rename before the function returns.
    """
    for path in (*staging.rglob("*"), staging):
        flush(path)
    staging.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """``fsync`` of a file or folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FLUSH:
            raise


def check_torch_archive(path: Path) -> None:
    """Verify the checksums that ``torch.save`` wrote; ``torch.load`` does not.

    Raises:
        zipfile.BadZipFile: one differs, or a member is compressed, which ``torch.save`` never does (a bomb).
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{member.filename} is compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"checksum of {damaged}")


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` of untrusted text.

    Raises:
        ValueError: malformed or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_bounded(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a small file.

    Raises:
        OSError: it cannot be read. ValueError: it has more than ``most`` bytes.
    """
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def read_json(path: Path) -> Any:
    """The JSON in a small file.

    Raises:
        OSError: it cannot be read. ValueError: too large, not UTF-8, malformed or nested too deeply.
    """
    return parse_json(read_bounded(path))
