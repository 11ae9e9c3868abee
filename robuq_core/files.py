"""Files that are whole or absent, also after a power cut: write beside the target, flush to disk, then rename."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A folder that cannot be flushed on its own: some network file systems, and folders that may be written but not read.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary path in the folder of ``path``; renamed over it if the block ends well, removed if it does not.

    The content is on the disk before the rename, and the rename before the function returns.

    Args:
        mode: permissions of the file; those that the user's umask takes away are absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL, mode)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(permissions)  # a library may have made the file anew
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(staging: Path, folder: Path) -> None:
    """Rename ``staging``, a finished folder, to ``folder`` beside it, which must not exist or be empty.

    Its content is on the disk before the rename, and the rename before the function returns.
    """
    for path in (*staging.rglob("*"), staging):
        flush(path)
    staging.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Return when the file ``path``, or the names in the folder ``path``, are on the disk (``fsync``)."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FLUSH:
            raise
