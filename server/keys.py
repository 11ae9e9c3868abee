"""API keys: a file that holds names, scopes and limits, and a store that reads it again when it changes. Knows no HTTP.

The file holds no key, only the SHA-256 of each. A plain hash is enough here: a key is 256 random bits, so no one can
guess keys and compare, and the slow, salted hashes that weak passwords need would only slow every request down.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from robuq_core.errors import UserError
from robuq_core.files import replacing

logger = logging.getLogger(__name__)

# read: routes that change nothing, such as /info and /metrics; every key has it.
Scope = Literal["read", "generate", "admin"]

# What is counted a minute.
RateUnit = Literal["requests", "images"]

# A fixed start lets scanners of source code and logs find keys that leaked.
KEY_PREFIX = "robuq_"
_KEY_BYTES = 32

# For which keys stay valid though their file cannot be read.
GRACE_S = 60.0


class ApiKey(BaseModel):
    """A client. ``sha256`` of the key in hex; limits per minute, ``None`` for no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("generate",)
    requests_per_minute: Annotated[int | None, Field(ge=1)] = None
    images_per_minute: Annotated[int | None, Field(ge=1)] = None
    created: AwareDatetime

    def limit(self, unit: RateUnit) -> int | None:
        """What it may use per minute; None for no limit."""
        return self.requests_per_minute if unit == "requests" else self.images_per_minute


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file; a UserError names the field that is wrong."""
    try:
        keys = KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; make it with: robuq-serve keys create NAME") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "content"
        raise UserError(
            f"{path}: {where}: {fault['msg']}; correct it, or make a new file with: robuq-serve keys create"
        ) from None
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two keys are named {twice!r}; rename one of them")
    return keys


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Keep other writers of ``path`` out; yields the file that it leads to, for a link must stay one.

    The folder is locked: the file itself is replaced by each write.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(handle)


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    """Replace the file; its owner, group and mode stay, or servers that run as another user could not read it."""
    before = path.stat() if path.exists() else None
    with replacing(path, mode=0o600 if before is None else stat.S_IMODE(before.st_mode)) as temporary:
        temporary.write_text(KeyFile(keys=tuple(keys)).model_dump_json(indent=2) + "\n")
        written = temporary.stat()
        if before is not None and (before.st_uid, before.st_gid) != (written.st_uid, written.st_gid):
            try:
                os.chown(temporary, before.st_uid, before.st_gid)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot keep its owner (user {before.st_uid}, group {before.st_gid}): {error.strerror}; "
                    "nothing was changed: run this as that user or as root"
                ) from error


def create_key(
    path: Path,
    name: str,
    *,
    scopes: Sequence[str] = ("generate",),
    requests_per_minute: int | None = None,
    images_per_minute: int | None = None,
) -> str:
    """Add a key to the file, which is made if it is missing, and return the key: it can never be read again."""
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    try:
        entry = ApiKey(
            name=name,
            sha256=hash_key(key),
            scopes=tuple(dict.fromkeys(scopes)),
            requests_per_minute=requests_per_minute,
            images_per_minute=images_per_minute,
            created=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}") from None
    with _locked(path) as path:
        keys = read_keys(path) if path.exists() else ()
        if any(other.name == name for other in keys):
            raise UserError(f"{path}: there is a key named {name!r}; revoke it first or choose another name")
        _write(path, [*keys, entry])
    return key


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file; running servers reject it from their next request on."""
    with _locked(path) as path:
        keys = read_keys(path)
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            raise UserError(f"{path}: no key is named {name!r}; robuq-serve keys list shows them")
        _write(path, kept)


class KeyStore:
    """The keys of a file, read again whenever it has changed. Not thread-safe.

    A file that cannot be read is tried again at every call. For :data:`GRACE_S` the keys of the last good one stay
    valid, since a typing mistake must not lock everyone out; then none is, since it may hold a revocation. A file that
    is gone makes every key invalid at once.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._unreadable_since: float | None = None
        self._closed = False
        self._seen = self._stamp()
        self._keys = read_keys(path)

    @property
    def unreadable_s(self) -> float:
        """Seconds for which the file could not be read; 0 if it can be now."""
        self._reload()
        return 0.0 if self._unreadable_since is None else max(1e-3, self._clock() - self._unreadable_since)

    @property
    def closed(self) -> bool:
        """Whether all keys are invalid because the file cannot be read."""
        self._reload()
        return self._closed

    def find(self, key: str) -> ApiKey | None:
        """The entry of ``key``. Every entry is compared, each in constant time, so that timing reveals nothing."""
        self._reload()
        wanted = hash_key(key)
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        return found

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes with the file's content; None if there is no telling."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        # The inode too: two replacements within one tick of the clock differ in it.
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _reload(self) -> None:
        stamp = self._stamp()
        if stamp is not None and stamp == self._seen:
            return
        try:
            keys = read_keys(self.path)
        except UserError as error:
            self._keep_or_close(error)
            return
        self._keys, self._seen, self._unreadable_since, self._closed = keys, stamp, None, False
        logger.info("API keys reloaded", extra={"keys": len(keys)})

    def _keep_or_close(self, error: UserError) -> None:
        now = self._clock()
        first, self._seen = self._unreadable_since is None, None
        if self._unreadable_since is None:
            self._unreadable_since = now
        # A file that is gone was taken away: it is no typing mistake.
        late = now - self._unreadable_since >= GRACE_S or isinstance(error.__cause__, FileNotFoundError)
        if late and not self._closed:
            self._keys, self._closed = (), True
            logger.error("API keys: %s; all requests will be rejected until the file can be read", error)
        elif first and not late:
            logger.error("API keys: %s; the old keys stay valid for %g s", error, GRACE_S)
