"""Mutated requests against a server process: of 5xx only 501 and 503, flat memory, probes answered, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence

import httpx
import psutil
import pytest
from process_harness import serving
from serving_harness import WAIT_S, until
from test_connection_limits import probe

CRLF = b"\r\n"
_BODY = b'{"class_id": 1, "steps": 2, "num_images": 2, "seed": 7, "guidance_scale": 1.5, "format": "png"}'


def _request(first: bytes, *headers: bytes, body: bytes | None = None) -> bytes:
    length = [] if body is None else [b"Content-Length: %d" % len(body)]
    return CRLF.join([first + b" HTTP/1.1", b"Host: localhost", *headers, *length, b"", body or b""])


def _chunked(body: bytes, size: int, trailers: bytes = b"") -> bytes:
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for i in range(0, len(body), size) if (piece := body[i : i + size])]
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunks) + b"0\r\n" + trailers + CRLF


SEEDS = [
    *(_request(b"GET " + path) for path in (b"/", b"/info", b"/queue", b"/metrics", b"/openapi.json", b"/web/app.js")),
    *(_request(b"GET " + path) for path in (b"/classes?query=shark&limit=3", b"/v1/models", b"/admin/checkpoint")),
    _request(b"GET /info", b"X-Request-Id: abc", b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
    _request(b"GET /health", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA=="),
    _request(b"GET /info") + _request(b"HEAD /health"),
    _request(b"GET /info").replace(b"HTTP/1.1", b"HTTP/1.0"),
    _request(b"POST /generate", b"Accept: application/json", b"Authorization: Bearer robuq_x", body=_BODY),
    _request(b"POST /generate", b"Accept: image/png", body=b'{"class_id": 1, "steps": 2}'),
    _request(b"POST /generate", body=_BODY[:-1] + b', "stream": true, "preview_every": 1}'),
    _request(b"POST /generate", body=b'{"class_name": "goldfish", "guidance_interval": [0, 800], "cache_interval": 2}'),
    _request(b"POST /generate", b"Expect: 100-continue", b"Origin: http://localhost", body=_BODY),
    _request(b"POST /v1/images/generations", body=b'{"prompt": "goldfish", "n": 2, "response_format": "b64_json"}'),
    _chunked(_BODY, 10),
    _chunked(_BODY, 1000, b"X-T: 1\r\nX-API-Key: robuq_x\r\n"),
]
TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff\xfe", b"%00", b"%0d%0a", b"/../", b"%2e%2e/", b"?", b"#"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Length: 0\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n", b"Connection: close\r\n"),
    *(b"Host: example.org\r\n", b"Origin: https://example.org\r\n", b"Accept: " + b"a/b," * 500 + b"\r\n"),
    *(b"X-Long: " + b"v" * 20_000 + b"\r\n", b"X-Many: 1\r\n" * 200, b"a" * 5000, b"Range: bytes=0-\r\n"),
    *(b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"[" * 5000, b'{"a":' * 1000, b'"\\ud800"', b"1e999", b"NaN", b"-1"),
    *(b"1" * 5000, b"null", b"\x1b[31m", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"),
    *(b"TRACE / HTTP/1.1\r\n\r\n", b"GET http://localhost/info HTTP/1.1\r\n\r\n", b"OPTIONS * HTTP/1.1\r\n\r\n"),
]
NUMBERS = [b"0", b"-1", b"1001", b"65536", b"4294967296", b"9" * 30, b"1e400", b"0x10", b"00", b"1.0"]


def _at(rng: random.Random, data: bytes) -> int:
    # As often at the edge of a line, where most of the parser's decisions are.
    edges = [found.start() for found in re.finditer(rb"\r\n|[ :{},\[]", data)]
    return rng.choice(edges) if edges and rng.random() < 0.5 else rng.randint(0, len(data))


def _mutate_once(rng: random.Random, data: bytes) -> bytes:
    first = _at(rng, data)
    last = min(len(data), first + int(rng.paretovariate(0.7)))
    numbers = list(re.finditer(rb"\d+", data))
    match rng.choice(["flip", "cut", "delete", "repeat", "insert", "insert", "number", "number", "splice", "shuffle"]):
        case "flip":
            return data[:first] + bytes([rng.randrange(256)]) + data[first + 1 :]
        case "cut":
            return data[:first]
        case "delete":
            return data[:first] + data[last:]
        case "repeat":
            return data[:last] + data[first:last] * min(1000, int(rng.paretovariate(0.7))) + data[last:]
        case "insert":
            return data[:first] + rng.choice(TOKENS) + data[first:]
        case "number" if numbers:
            found = rng.choice(numbers)
            return data[: found.start()] + rng.choice(NUMBERS) + data[found.end() :]
        case "splice":
            other = rng.choice(SEEDS)
            return data[:first] + other[_at(rng, other) :]
        case "shuffle":
            line, *lines = data.split(CRLF)
            rng.shuffle(lines)
            return CRLF.join([line, *lines])
    return data


def _mutate(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        data = _mutate_once(rng, data)
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
        return _mutate(rng, data)
    if kind < 0.75 and b"Content-Length" in head:
        body = _mutate(rng, body)
        lines[-1] = b"Content-Length: %d" % len(body)
    else:
        number = rng.randrange(len(lines) - (b"Content-Length" in head))
        begin, space, rest = lines[number].partition(b" ")
        target, version = rest.rsplit(b" ", 1) if number == 0 else (rest, b"")
        value = re.sub(rb"[\r\n\0]", b"", _mutate(rng, target))
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


MIB = 2**20
HEALTH_S = 10.0  # an idle machine takes milliseconds
WAIT_FOR_ANSWER_S = 2.0  # some mutants are half a request, for whose rest the server waits


class Prober(threading.Thread):
    """Asks /health on new connections until it is stopped; remembers the slowest answer and what was not 200."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.slowest_s, self.answers, self.wrong = 0.0, 0, 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            began = time.monotonic()
            good = probe(self.client) == 200
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1
            self.wrong += not good


@pytest.mark.parametrize(("requests", "seed"), [(400, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_mutated_requests(requests: int, seed: int) -> None:
    rng = random.Random(seed)
    with serving(change="sampler.step_s = 0.0") as (process, client):
        address = (client.base_url.host, client.base_url.port or 80)
        memory = psutil.Process(process.pid).memory_info
        # What is allocated once, such as for the first image of each kind, is no leak.
        asyncio.run(send_all(address, [mutated(rng) for _ in range(200)], seed, WAIT_FOR_ANSWER_S))
        before = memory().rss
        prober = Prober(client)
        prober.start()
        statuses = asyncio.run(send_all(address, [mutated(rng) for _ in range(requests)], seed, WAIT_FOR_ANSWER_S))
        prober.ended.set()
        prober.join(WAIT_S)
        grown = (memory().rss - before) / MIB
        print(f"{dict(statuses)}; {grown:.1f} MiB; slowest of {prober.answers} probes {prober.slowest_s * 1e3:.0f} ms")
        assert {status for status in statuses if status >= 500} <= {501, 503}  # 501: a Transfer-Encoding
        # The mutations leave some right, make some no HTTP, and reach the routes with others.
        assert min(statuses[200], statuses[400], statuses[422]) > requests / 100
        assert grown < 32
        assert prober.answers > 0
        assert prober.wrong == 0
        assert prober.slowest_s < HEALTH_S
        until(lambda: client.get("/queue").json()["images_in_flight"] == 0, every_s=0.05)
        assert client.post("/generate", json={"class_id": 1}).status_code == 200
        assert process.poll() is None
        assert not [line for line in process.output.splitlines() if '"exception"' in line]
        assert not process.error_output
