"""What public bug reports of other servers were about, on a raw socket: HEAD, Host, HTTP/1.0, encodings, odd JSON."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from serving_harness import live_server
from test_connection_limits import connected, read_all

from server.fake import FakeSampler
from server.launch import bind

HOST = b"Host: localhost\r\nConnection: close\r\n"
BODY = b'{"class_id": 1, "steps": 1, "seed": 3}'


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live_server(FakeSampler(), max_body_bytes=4096) as (client, _):
        yield client


def exchange(client: httpx.Client, request: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers as they came, and body, of a request whose answer ends the connection."""
    with connected(client) as sock:
        sock.sendall(request)
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
    return int(first.split()[1]), headers, body


def post(client: httpx.Client, body: bytes, *headers: str) -> tuple[int, bytes]:
    lines = "".join(f"{line}\r\n" for line in headers).encode()
    head = b"POST /generate HTTP/1.1\r\n" + HOST + lines + b"Content-Length: %d\r\n\r\n" % len(body)
    status, _, answer = exchange(client, head + body)
    return status, answer


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/metrics", "/info", "/classes", "/queue", "/openapi.json", "/docs",
             "/web/app.js", "/v1/models", "/v1/models/fake", "/nowhere"]
)  # fmt: skip
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    varying = ("date", "x-request-id", "content-length") if path == "/metrics" else ("date", "x-request-id")
    seen = []
    for method in ("GET", "HEAD"):
        status, headers, body = exchange(client, f"{method} {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
        assert bool(body) == (method == "GET")
        assert "content-length" in dict(headers)
        seen.append((status, [header for header in headers if header[0] not in varying]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nConnection: close\r\n", 400),
        (b"GET /info HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"GET /info HTTP/1.0\r\nHost: a\r\nHost: b\r\n", 400),
        (b"GET /info HTTP/1.0\r\n", 200),
        (b"HEAD /generate HTTP/1.1\r\n" + HOST, 405),
        (b"POST /generate HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n", 501),
        (b"POST /generate HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501),
    ],
)
def test_framing_and_host_leave_nothing_open(client: httpx.Client, head: bytes, status: int) -> None:
    found, headers, body = exchange(client, head + b"\r\n")
    assert found == status
    assert [value for name, value in headers if name == "connection"] == ["close"]
    if status not in (200, 405):
        code = {400: "invalid_http", 501: "unsupported_transfer_encoding"}[status]
        assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize("extra", [b"", b"Connection: keep-alive\r\n"])
@pytest.mark.parametrize("path", [b"/generate", b"/v1/images/generations"])
def test_a_stream_to_http_1_0_ends_with_its_connection(client: httpx.Client, path: bytes, extra: bytes) -> None:
    body = b'{"class_id": 1, "steps": 3, "stream": true, "prompt": "1"}'
    if path == b"/generate":
        body = body.replace(b', "prompt": "1"', b"")
    head = b"POST " + path + b" HTTP/1.0\r\n" + extra + b"Content-Length: %d\r\n\r\n" % len(body)
    status, headers, answer = exchange(client, head + body)
    assert status == 200
    assert [value for name, value in headers if name == "connection"] == ["close"]
    assert "transfer-encoding" not in dict(headers)
    *events, rest = answer.split(b"\n\n")
    assert not rest
    assert all(event.startswith((b"event: ", b": ")) for event in events)
    assert events[-1].startswith(b"event: image_generation.completed\ndata: {")


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [(BODY, "identity", 200), (b"\xef\xbb\xbf" + BODY, "", 200), (BODY, "gzip", 415), (BODY, "br", 415)],
)
def test_bodies_are_sent_as_they_are(client: httpx.Client, body: bytes, encoding: str, status: int) -> None:
    found, answer = post(client, body, f"Content-Encoding: {encoding}")
    assert found == status
    assert status == 200 or json.loads(answer)["error"]["code"] == "unsupported_encoding"


def test_image_jpg_is_accepted(client: httpx.Client) -> None:
    head = b"POST /generate HTTP/1.1\r\n" + HOST + b"Accept: image/jpg\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    status, headers, body = exchange(client, head + BODY)
    assert (status, dict(headers)["content-type"]) == (200, "image/jpeg")
    assert body.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("seed", [-1, None, 0, 2**32, 2**53 - 1])
def test_seeds_of_other_tools(client: httpx.Client, seed: int | None) -> None:
    status, answer = post(client, json.dumps({"class_id": 1, "steps": 1, "seed": seed}).encode())
    found = json.loads(answer)["seed"]
    assert status == 200
    assert found == seed if seed is not None and seed >= 0 else 0 <= found < 2**32


def test_localhost_is_every_loopback_address() -> None:
    names = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    sockets = bind("localhost", 0)
    try:
        bound = {sock.getsockname()[0] for sock in sockets}
        assert "127.0.0.1" in bound
        assert bound <= names
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        if socket.has_ipv6 and "::1" in names and _ipv6():
            assert "::1" in bound
    finally:
        for sock in sockets:
            sock.close()


def _ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_both_loopback_addresses_where_ipv6_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
             (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = bind("localhost", 0)
    try:
        assert [sock.getsockname()[0] for sock in sockets] == ["::1", "127.0.0.1"]
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()
