"""What comes before the rest of the server is imported: the port, worker processes, the frames between them and it."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from robuq_core.errors import UserError
from server.settings import Settings

WORKER_COMMAND: Sequence[str] = (sys.executable, "-m", "server.worker")


def bind(host: str, port: int) -> list[socket.socket]:
    """Take the port on every address of ``host``, so that a taken one shows at once.

    Raises:
        UserError: it is taken, or there is no such address.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(found):
            # All on the port that the first one got.
            at = (address[0], port or (sockets[0].getsockname()[1] if sockets else 0))
            try:
                sockets.append(socket.create_server(at, family=family))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # localhost may name ::1 on a machine without IPv6
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return sockets


def memory_file(name: str) -> int:
    """Descriptor of a new empty file without a path; its memory is freed with the last descriptor and mapping."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Handle(Protocol):
    """A worker as the pool sees it; ``pid`` is 0 for one that is no process."""

    sock: socket.socket
    pid: int

    def kill(self) -> None:
        """End it at once; it may have ended before."""

    def exit_code(self) -> int | None:
        """As of :class:`subprocess.Popen`: negative for a signal, None while it runs."""


class ProcessHandle:
    """A worker process at the other end of ``sock``."""

    def __init__(self, settings: Settings, weights: int) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            os.set_inheritable(weights, True)
            descriptors = (theirs.fileno(), weights)
            arguments = (*descriptors, os.getpid(), settings.log_level)
            # A group of its own: Ctrl+C is for the server, which lets its workers finish.
            self._process = subprocess.Popen(
                [*WORKER_COMMAND, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                process_group=0,
            )
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def exit_code(self) -> int | None:
        return self._process.poll()


Launch = Callable[[Settings, int], Handle]
# The file for the weights, and the workers that were started before the event loop.
Prepared = tuple[int | None, Sequence[Handle]]


def prepare(settings: Settings) -> Prepared:
    """Start the first workers now, so that they load while the rest of the server does."""
    weights = memory_file("robuq-weights")
    return weights, [ProcessHandle(settings, weights) for _ in range(settings.replicas)]


# Frames between the server and a worker: a JSON object and, after it, bytes.
_SIZES = struct.Struct("!II")  # bytes of the JSON object, bytes after it
_encode = json.JSONEncoder(separators=(",", ":")).encode

Frame = tuple[dict[str, Any], bytes]


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
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
