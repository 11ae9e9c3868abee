"""Frames between the server and a worker: a JSON object and, after it, bytes. Knows neither of the two."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

_SIZES = struct.Struct("!II")  # bytes of the JSON object, bytes after it
_encode = json.JSONEncoder(separators=(",", ":")).encode

Frame = tuple[dict[str, Any], bytes]


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame as bytes."""
    text = _encode(head).encode()
    return b"".join((_SIZES.pack(len(text), len(body)), text, body))


class Unpacker:
    """Frames from a stream that may be cut anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole now that ``data`` has arrived."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _SIZES.size:
                text, body = _SIZES.unpack_from(buffer, start)
                middle = start + _SIZES.size + text
                end = middle + body
                if len(buffer) < end:
                    break
                head = json.loads(buffer[start + _SIZES.size : middle])
                start = end
                yield head, bytes(memoryview(buffer)[middle:end]) if body else b""
        finally:
            del buffer[:start]
