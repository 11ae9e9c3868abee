"""Requests that were right before they were mutated, by a seed; and a client that sends many of them at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

CRLF = b"\r\n"
_BODY = b'{"class_id": 1, "steps": 2, "num_images": 2, "seed": 7, "guidance_scale": 1.5, "format": "png"}'


def _post(path: bytes, body: bytes, *headers: bytes) -> bytes:
    head = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers]
    return CRLF.join([*head, b"Content-Length: %d" % len(body), b"", body])


def _chunked(path: bytes, body: bytes, size: int, trailers: bytes = b"") -> bytes:
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for i in range(0, len(body), size) if (piece := body[i : i + size])]
    head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunks) + b"0\r\n" + trailers + CRLF


def _get(target: bytes, *headers: bytes) -> bytes:
    return CRLF.join([b"GET " + target + b" HTTP/1.1", b"Host: localhost", *headers, b"", b""])


SEEDS = [
    *(_get(path) for path in (b"/", b"/info", b"/queue", b"/metrics", b"/ready", b"/openapi.json", b"/web/app.js")),
    *map(_get, (b"/classes?query=shark&limit=3", b"/v1/models", b"/admin/checkpoint")),
    _get(b"/info", b"X-Request-Id: abc", b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
    _get(b"/health", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA=="),
    _get(b"/info") + _get(b"/health"),
    _post(b"/generate", _BODY, b"Accept: application/json", b"Authorization: Bearer robuq_x"),
    _post(b"/generate", _BODY.replace(b'"num_images": 2', b'"num_images": 1'), b"Accept: image/png"),
    _post(b"/generate", _BODY[:-1] + b', "stream": true, "preview_every": 1}', b"Accept: text/event-stream"),
    _post(b"/generate", b'{"class_name": "goldfish", "guidance_interval": [0, 800], "cache_interval": 2}'),
    _post(b"/generate", _BODY, b"Expect: 100-continue", b"Origin: http://localhost", b"Sec-Fetch-Site: same-origin"),
    _post(b"/v1/images/generations", b'{"prompt": "goldfish", "n": 2, "response_format": "b64_json"}'),
    _chunked(b"/generate", _BODY, 10),
    _chunked(b"/generate", _BODY, 1000, b"X-T: 1\r\nX-API-Key: robuq_x\r\n"),
    _get(b"/info").replace(b"GET", b"OPTIONS"),
    _get(b"/info").replace(b"GET", b"HEAD"),
    _get(b"/info").replace(b"HTTP/1.1", b"HTTP/1.0"),
]  # fmt: skip
TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff\xfe", b"%00", b"%0d%0a", b"/../", b"%2e%2e/", b"?", b"#"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Length: 0\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n", b"Connection: close\r\n"),
    *(b"Host: example.org\r\n", b"Origin: https://example.org\r\n", b"Accept: " + b"a/b," * 500 + b"\r\n"),
    *(b"X-Long: " + b"v" * 20_000 + b"\r\n", b"X-Many: 1\r\n" * 200, b"a" * 5000, b"Range: bytes=0-\r\n"),
    *(b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"[" * 5000, b'{"a":' * 1000, b'"\\ud800"', b"1e999", b"NaN", b"-1"),
    *(b"1" * 5000, b"true", b"null", b"\x1b[31m", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"),
    *(b"TRACE / HTTP/1.1\r\n\r\n", b"GET http://localhost/info HTTP/1.1\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n"),
]  # fmt: skip


def _at(rng: random.Random, data: bytes) -> int:
    # As often at the edge of a line, where most of the parser's decisions are.
    edges = [found.start() for found in re.finditer(rb"\r\n|[ :{},\[]", data)]
    return rng.choice(edges) if edges and rng.random() < 0.5 else rng.randint(0, len(data))


def _slice(rng: random.Random, data: bytes) -> tuple[int, int]:
    first = _at(rng, data)
    return first, min(len(data), first + int(rng.paretovariate(0.7)))


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _delete(rng: random.Random, data: bytes) -> bytes:
    first, last = _slice(rng, data)
    return data[:first] + data[last:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    first, last = _slice(rng, data)
    return data[:last] + data[first:last] * min(1000, int(rng.paretovariate(0.7))) + data[last:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def _number(rng: random.Random, data: bytes) -> bytes:
    numbers = list(re.finditer(rb"\d+", data))
    if not numbers:
        return data
    found = rng.choice(numbers)
    value = rng.choice([b"0", b"-1", b"1001", b"65536", b"4294967296", b"9" * 30, b"1e400", b"0x10", b"00", b"1.0"])
    return data[: found.start()] + value + data[found.end() :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    other = rng.choice(SEEDS)
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def _lines(rng: random.Random, data: bytes) -> bytes:
    first, *lines = data.split(CRLF)
    rng.shuffle(lines)
    return CRLF.join([first, *lines])


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _at(rng, data)]


_MUTATIONS: Sequence[Callable[[random.Random, bytes], bytes]] = (
    *(_flip, _delete, _repeat, _insert, _insert, _number, _number, _splice, _lines, _truncate),
)


def _some(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_MUTATIONS)(rng, data)
    return data[:200_000]


def mutated(rng: random.Random) -> bytes:
    """One request of :data:`SEEDS` after one to three mutations: of all bytes, of its body, or of a line of its head.

    The latter two keep to HTTP, so that they reach the routes.
    """
    data = rng.choice(SEEDS)
    head, _, body = data.partition(CRLF + CRLF)
    lines = head.split(CRLF)
    kind = rng.random()
    if kind < 0.4:
        return _some(rng, data)
    if kind < 0.75 and b"Content-Length" in head:
        body = _some(rng, body)
        lines[-1] = b"Content-Length: %d" % len(body)
    else:
        number = rng.randrange(len(lines) - (b"Content-Length" in head))
        begin, space, rest = lines[number].partition(b" ")
        target, version = rest.rsplit(b" ", 1) if number == 0 else (rest, b"")
        value = re.sub(rb"[\r\n\0]", b"", _some(rng, target))
        if number == 0:
            value = b"/" + re.sub(rb"[^!-~]", b"", value)[1:] + b" " + version
        lines[number] = begin + space + value
    return CRLF.join([*lines, b"", body])


async def send_all(address: tuple[str, int], requests: Sequence[bytes], seed: int, wait_s: float) -> Counter[int]:
    """Send each on a connection of its own, 32 at a time, in one to three pieces; how often each status was read.

    A request that is not answered within ``wait_s``, since the server still waits for a part of it, counts as 0.
    """
    statuses: Counter[int] = Counter()
    turn = asyncio.Semaphore(32)
    rng = random.Random(seed)

    async def send(data: bytes) -> None:
        cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 2)))
        answer = b""
        async with turn:
            reader, writer = await asyncio.open_connection(*address)
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(wait_s):
                    for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True):
                        writer.write(data[first:last])
                        await writer.drain()
                    while piece := await reader.read(65536):
                        answer += piece
                        if b"\r\n\r\n" in answer and not answer.endswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
                            break
            writer.transport.abort()
        found = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z][\w' -]*\r\n", answer)
        statuses.update(map(int, found) if found else [0])

    await asyncio.gather(*map(send, requests))
    return statuses
