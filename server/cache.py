"""Equal requests are generated once: images that were sent before come from memory, and requests in flight are shared.

The same checkpoint, class, seed, settings and file format give the same bytes, so nothing here ever expires. A request
without a seed is never equal to another, unless its ``Idempotency-Key`` stands for one. The event loop owns the cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from fastapi import Request as HttpRequest

from robuq_core.config import MAX_SEED
from server.access import client_of
from server.errors import invalid
from server.metrics import Metrics
from server.request import Request, Result, Timings

CACHE_HEADER = "X-Cache"
IDEMPOTENCY_HEADER = "Idempotency-Key"
# What an entry takes beside its images, roughly.
ENTRY_BYTES = 2048

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_NO_TIME = Timings(0.0, 0.0, 0.0, 0.0)


def idempotent_seed(request: HttpRequest) -> int | None:
    """The seed that an ``Idempotency-Key`` stands for, the same for each client (API key) that repeats it; None without
    the header."""
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        message = f"{IDEMPOTENCY_HEADER} must be 1 to 255 visible ASCII characters, such as a UUID"
        raise invalid(IDEMPOTENCY_HEADER, message)
    digest = hashlib.sha256(f"{client_of(request.scope)}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8]) % (MAX_SEED + 1)


@dataclass(frozen=True)
class _Entry:
    result: Result
    size: int


def _key_of(request: Request) -> Hashable:
    """All that the bytes of the answer depend on."""
    model = request.model
    # The digest is of the network; the folder of a latent model's decoder may have changed since the last load.
    decoder = None if model.decoder_name == "pixels" else (model.decoder_name, model.created)
    return (model.digest, model.name, decoder, request.specs, request.seed, request.image_format, request.as_base64)


class Cache:
    """Images by what made them, and equal requests in flight.

    Args:
        max_bytes: most that all images may take; the least recently used go first. 0 turns all of this off.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._kept: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._flying: dict[Hashable, Request] = {}
        self.size = 0

    def find(self, request: Request) -> bool:
        """Give ``request`` its result, or the equal request in flight as its leader; False if it must be generated."""
        if not self._max_bytes or not request.repeatable:
            return False
        key = _key_of(request)
        entry, other = self._kept.get(key), self._flying.get(key)
        if entry is not None:
            self._kept.move_to_end(key)
            request.source = "hit"
            request.future = asyncio.get_running_loop().create_future()
            request.future.set_result(Result(entry.result.images, _NO_TIME))
        # One that is watched waits for events of its own.
        elif other is not None and not other.future.done() and not request.watched:
            request.source, request.leader, request.future = "shared", other, other.future
        else:
            request.source = "miss"
        self._metrics.cache_requests.labels(request.source).inc()
        return request.source != "miss"

    def follow(self, request: Request) -> None:
        """Let equal requests find this one, which was just submitted, and its images once it has succeeded."""
        if not self._max_bytes or not request.repeatable:
            return
        key = _key_of(request)
        self._flying[key] = request

        def ended(future: asyncio.Future[Result]) -> None:
            if self._flying.get(key) is request:
                del self._flying[key]
            if not future.cancelled() and future.exception() is None:
                self._keep(key, future.result())

        request.future.add_done_callback(ended)

    def _keep(self, key: Hashable, result: Result) -> None:
        size = ENTRY_BYTES + sum(map(len, result.images))
        if size > self._max_bytes:
            return
        replaced = self._kept.pop(key, None)
        self.size += size - (replaced.size if replaced is not None else 0)
        self._kept[key] = _Entry(result, size)
        while self.size > self._max_bytes:
            self.size -= self._kept.popitem(last=False)[1].size
