"""Repeated requests with one ``Idempotency-Key``: they join the first while it runs, and get its answer afterwards.

Keys are apart for every client (API key); on an open server all clients share one space. Only successes are kept.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.api.errors import ApiError, invalid
from server.api.generation import Generation, Replay
from server.api.order import Order
from server.engine import Result

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"
MAX_BYTES = 64 * 2**20
# What an entry takes beside its images, roughly.
ENTRY_BYTES = 2048

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def checked_key(value: str) -> str:
    """The header's value, or the 422 that tells what it may be."""
    if not _KEY.fullmatch(value):
        raise invalid(HEADER, f"{HEADER} must be 1 to 255 visible ASCII characters, such as a UUID")
    return value


def fingerprint(*parts: str) -> bytes:
    """What two requests must share to count as the same: route, kind of answer, body with its defaults."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


@dataclass(frozen=True)
class _Kept:
    fingerprint: bytes
    order: Order
    result: Result
    expires_at: float
    size: int


class Replays:
    """Answers by client and key. The event loop owns it.

    Args:
        ttl_s: seconds that an answer is kept.
        max_bytes: most that all answers may take; beyond it the client that holds most loses its oldest.
    """

    def __init__(self, ttl_s: float, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._running: dict[tuple[str, str], tuple[bytes, Generation]] = {}
        # By client, then by key in the order of their ends, so that the first is the next to expire.
        self._kept: dict[str, dict[str, _Kept]] = {}
        self._sizes: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Bytes of all answers."""
        return sum(self._sizes.values())

    def find(self, client: str, key: str, fingerprint: bytes) -> Generation | None:
        """What the first request with this key is doing or has come to; None if this is the first.

        Raises:
            ApiError: 409 if the first had another body.
        """
        self._drop_expired()
        running = self._running.get((client, key))
        if running is not None and not running[1].outcome.cancelled():
            _check_same(running[0], fingerprint)
            return running[1]
        kept = self._kept.get(client, {}).get(key)
        if kept is None:
            return None
        _check_same(kept.fingerprint, fingerprint)
        return Replay(kept.order, kept.result)

    def begin(self, client: str, key: str, fingerprint: bytes, generation: Generation) -> None:
        """Let later requests with this key find ``generation``, and its answer once it has succeeded."""
        self._running[client, key] = (fingerprint, generation)
        generation.outcome.add_done_callback(lambda _: self._end(client, key, fingerprint, generation))

    def _end(self, client: str, key: str, fingerprint: bytes, generation: Generation) -> None:
        if self._running.get((client, key), (b"", None))[1] is generation:
            del self._running[client, key]
        outcome = generation.outcome
        if outcome.cancelled() or outcome.exception() is not None:
            return
        result = outcome.result()
        size = ENTRY_BYTES + sum(map(len, result.images))
        kept = _Kept(fingerprint, generation.order, result, self._clock() + self._ttl_s, size)
        self._kept.setdefault(client, {})[key] = kept
        self._sizes[client] = self._sizes.get(client, 0) + size
        while self.size > self._max_bytes:
            self._drop_oldest(max(self._sizes, key=self._sizes.__getitem__))

    def _drop_expired(self) -> None:
        now = self._clock()
        for client in list(self._kept):
            while client in self._kept and next(iter(self._kept[client].values())).expires_at <= now:
                self._drop_oldest(client)

    def _drop_oldest(self, client: str) -> None:
        entries = self._kept[client]
        kept = entries.pop(next(iter(entries)))
        self._sizes[client] -= kept.size
        if not entries:
            del self._kept[client], self._sizes[client]


def _check_same(first: bytes, second: bytes) -> None:
    if first != second:
        message = f"this {HEADER} came with another request before; use a new one for each request"
        raise ApiError(409, "idempotency_conflict", message, field=HEADER)
