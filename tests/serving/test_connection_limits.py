"""Bytes on a socket that are no honest request: endless heads, slow ones, silence, crowds."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat

import httpx
import pytest
from serving_harness import WAIT_S, live_server, until

from server import connection
from server.access import PROBE_PATHS
from server.fake import FakeSampler
from server.middleware import SECURITY_HEADERS

# Of a time limit that an answer must come within: the next where the machine is too busy for the one before.
LIMITS_S = (0.5, 4.0, 30.0)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live_server(FakeSampler(), max_connections=20, max_body_bytes=200_000) as (client, _):
        yield client


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=WAIT_S) as sock:
        yield sock


def send_for_ever(sock: socket.socket, piece: bytes) -> None:
    """Until it raises."""
    while True:
        sock.sendall(piece)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes; a reset counts as that."""
    received = b""
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def probe(client: httpx.Client, path: str = "/health") -> int:
    """The status that a new connection gets."""
    with connected(client) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return int(read_all(sock).split(b" ", 2)[1])


def answered(raw: bytes) -> tuple[int, str]:
    """Status and code of a whole answer in our shape."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"content-type: application/json" in head.lower()
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert {name.lower(): value.lower() for name, value in SECURITY_HEADERS.items()}.items() <= headers.items()
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    return int(head.split(b" ")[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "garbage",
    [b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
     b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
     b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
     b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
     b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"GET /\xff HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_gets_400_in_our_shape(client: httpx.Client, garbage: bytes) -> None:
    with connected(client) as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        raw = read_all(sock)
        assert b"Traceback" not in raw
        assert answered(raw) == (400, "invalid_http")


@pytest.mark.parametrize(
    "head",
    [
        [b"GET /", *repeat(b"a" * 1000, 1000)],
        [b"GET / HTTP/1.1\r\nX-Long: ", *repeat(b"a" * 1000, 1000)],
        [b"GET / HTTP/1.1\r\n", *repeat(b"X-Many: 1\r\n" * 90, 1000)],
    ],
)
def test_a_head_that_does_not_end_is_cut_off(client: httpx.Client, head: list[bytes]) -> None:
    with connected(client) as sock:
        sent = 0
        try:
            for piece in head:
                sent += sock.send(piece)
        except ConnectionError:
            pass
        else:
            assert answered(read_all(sock)) == (431, "headers_too_large")
        assert sent >= connection.MAX_OUTSIDE_BYTES / 2


def test_a_slow_head_gets_408(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    with connected(client) as sock:
        sock.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\n")
        assert answered(read_all(sock)) == (408, "head_timeout")


def test_a_slow_second_head_does_not_disturb_the_first_answer(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit_s in LIMITS_S:
        monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", limit_s)
        with connected(client) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /info HTT")
            first, _, second = read_all(sock).partition(b'{"status":"ready"}')
        if first:  # or it was so late that the connection had been closed
            break
    assert first.startswith(b"HTTP/1.1 200 ")
    assert answered(second) == (408, "head_timeout")


def test_a_body_that_goes_on_after_its_answer_is_cut_off(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BODY_GRACE_S", 0.0)
    for limit_s in LIMITS_S:
        monkeypatch.setattr(connection, "BODY_TIMEOUT_S", limit_s)
        with connected(client) as sock:
            sock.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n{")
            raw = read_all(sock)  # ends, so the connection was closed
        if raw:
            break
    assert raw.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_sends_nothing_is_let_go(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = connection.GuardedProtocol.__init__

    def impatient(self: connection.GuardedProtocol, *arguments: object, **options: object) -> None:
        whole(self, *arguments, **options)
        self.timeout_keep_alive = 0.2  # type: ignore[assignment]

    monkeypatch.setattr(connection.GuardedProtocol, "__init__", impatient)
    with connected(client) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\r\n")  # a blank line is no request
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_never_begins_is_let_go_soon(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_REQUEST_S", 0.2)
    with connected(client) as silent, connected(client) as blank:
        blank.sendall(b"\r\n")
        assert read_all(silent) == read_all(blank) == b""


def test_a_client_that_reads_nothing_is_let_go(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.2)
    one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(client) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(ConnectionError):  # reset: nothing more is taken from it
            send_for_ever(sock, one)


def test_more_requests_at_once_than_a_client_may_send_ahead_end_the_connection(client: httpx.Client) -> None:
    for number, whole in ((connection.MAX_PIPELINED, True), (20_000, False)):
        with connected(client) as sock:
            # At once: the server sees them all before it can answer one.
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * number + b"GET /health HTTP/1.0\r\n\r\n" * whole)
            assert (read_all(sock).count(b"HTTP/1.1 200 ") == number + 1) == whole


def ask_info(crowd: ExitStack, client: httpx.Client, source: str = "127.0.0.1") -> bytes:
    """The answer to a connection from ``source`` that stays open."""
    address = (client.base_url.host, client.base_url.port or 80)
    sock = crowd.enter_context(socket.create_connection(address, WAIT_S, (source, 0)))
    sock.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return sock.recv(65536)


def test_more_connections_than_allowed_are_turned_away_but_probes_are_answered() -> None:
    with live_server(FakeSampler(), max_connections=20) as (client, _), ExitStack() as crowd:
        assert all(ask_info(crowd, client).startswith(b"HTTP/1.1 200 ") for _ in range(20))
        raw = ask_info(crowd, client)
        assert answered(raw) == (503, "too_many_connections")
        assert b"retry-after: 1\r\n" in raw
        for path in sorted(PROBE_PATHS):
            with connected(client) as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                raw = read_all(sock)
                assert raw.startswith(b"HTTP/1.1 200 ")
                assert b"connection: close" in raw
        crowd.close()
        until(lambda: client.get("/info").status_code == 200)


@pytest.mark.parametrize(("proxies", "allowed"), [((), 5), (("127.0.0.0/8",), 8)])
def test_one_peer_does_not_take_the_connections_of_the_others_unless_it_is_a_proxy(
    proxies: tuple[str, ...], allowed: int
) -> None:
    options = {"max_connections": 20, "max_connections_per_peer": 5, "trusted_proxies": proxies}
    with live_server(FakeSampler(), **options) as (client, _), ExitStack() as crowd:
        for source in ("127.0.0.1", "127.0.0.2"):
            statuses = [int(ask_info(crowd, client, source).split(b" ")[1]) for _ in range(8)]
            assert statuses == [200] * allowed + [503] * (8 - allowed)


@pytest.mark.parametrize(
    ("address", "peer"),
    [("10.1.2.3", "10.1.2.3"), ("::ffff:10.1.2.3", "10.1.2.3"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("", "")],
)
def test_addresses_of_one_peer(address: str, peer: str) -> None:
    assert connection._peer_of((address, 1)) == peer


def test_what_follows_an_upgrade_is_the_next_request(client: httpx.Client) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    with connected(client) as sock:
        sock.sendall(upgrade + upgrade + b"GET /ready HTTP/1.0\r\n\r\n")
        assert read_all(sock).count(b"HTTP/1.1 200 ") == 3
