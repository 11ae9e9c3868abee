"""What a stranger can send to a server process: it keeps its memory, answers probes and serves the others."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from process_harness import Process, serving
from serving_harness import WAIT_S, WatchedSampler, live_server, until
from test_connection_limits import connected, probe, read_all

from server.fake import FakeSampler
from server.keys import create_key

MIB = 2**20
CHUNKED = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Process, httpx.Client]]:
    # Silent connections stay until a test closes them.
    with serving(at_start="import server.connection as c; c.FIRST_REQUEST_S = 600.0") as (process, client):
        yield process, client


@pytest.mark.parametrize("piece", [b"X-T: " + b"v" * 60 + b"\r\n", b"v"], ids=["fields", "value"])
def test_endless_trailers_are_cut_off(server: tuple[Process, httpx.Client], piece: bytes) -> None:
    process, client = server
    memory = psutil.Process(process.pid).memory_info
    before, most, sent = memory().rss, 200 * MIB, []

    def send_trailers(_: int) -> None:
        with connected(client) as sock:
            try:
                sock.sendall(CHUNKED + b"\r\n1\r\n{\r\n0\r\nX-T: ")
                for size in iter(lambda: sock.send(piece * (65536 // len(piece))), 0):
                    sent.append(size)
                    if sum(sent) > most:
                        return
            except ConnectionError:
                pass

    with ThreadPoolExecutor(8) as pool:
        senders = [pool.submit(send_trailers, i) for i in range(8)]
        while not all(sender.done() for sender in senders):
            assert probe(client) == 200
            assert memory().rss - before < 32 * MIB
        for sender in senders:
            sender.result()
    # What the buffers of eight sockets hold may have been sent after the end.
    assert sum(sent) < most


def test_small_trailers_are_dropped(tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.json", "alice")
    body = b'1b\r\n{"class_id": 1, "steps": 1}\r\n'
    trailers = f"0\r\nX-API-Key: {key}\r\nAuthorization: Bearer {key}\r\nX-Request-Id: mine\r\n\r\n".encode()
    with live_server(FakeSampler(), api_keys_file=tmp_path / "keys.json") as (client, _):
        for header, status in ((b"", b"401"), (f"X-API-Key: {key}\r\n".encode(), b"200")):
            with connected(client) as sock:
                # In one piece, so that the trailers are read before the request is answered; the connection stays.
                last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                sock.sendall(CHUNKED + header + b"\r\n" + body + trailers + last)
                raw = read_all(sock)
            assert raw.startswith(b"HTTP/1.1 " + status)
            assert b"x-request-id: mine" not in raw
            assert raw.count(b"HTTP/1.1 200 ") == 1 + (status == b"200")


def test_a_thousand_silent_sockets_do_not_stop_probes_nor_other_peers(server: tuple[Process, httpx.Client]) -> None:
    _, client = server
    address = (client.base_url.host, client.base_url.port or 80)
    with ExitStack() as crowd:
        for _ in range(1005):
            crowd.enter_context(connected(client))
        for path in ("/health", "/ready"):
            assert probe(client, path) == 200
        with socket.create_connection(address, WAIT_S, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert read_all(other).startswith(b"HTTP/1.1 200 ")
        assert probe(client, "/info") == 503
    until(lambda: probe(client, "/info") == 200)


def test_one_key_does_not_fill_the_queue_of_the_others(tmp_path: Path) -> None:
    greedy, other = (create_key(tmp_path / "keys.json", name) for name in ("greedy", "other"))
    sampler = WatchedSampler()
    draw = {"class_id": 1, "steps": 1000, "num_images": 16}
    with (
        live_server(sampler, api_keys_file=tmp_path / "keys.json", max_batch_rows=32, max_queue_images=256) as (
            client,
            engine,
        ),
        ThreadPoolExecutor(32) as pool,
    ):
        sampler.hold()

        def ask(key: str, body: dict[str, int]) -> httpx.Response:
            return client.post("/generate", json=body, headers={"X-API-Key": key})

        flood = [pool.submit(ask, greedy, draw) for _ in range(30)]
        until(lambda: sum(each.done() for each in flood) >= 30 - 18)  # 256 wait and at most 32 run
        refused = {each.result().status_code for each in flood if each.done()}
        assert refused == {429}
        assert engine.load().images_waiting > 256 - 16
        modest = [pool.submit(ask, other, {"class_id": i, "steps": 1, "num_images": 16}) for i in range(2)]
        until(lambda: sum(each.done() for each in flood) >= 30 - 16)  # two made room
        late = [each.result() for each in flood if each.done()]
        assert {answer.json()["error"]["code"] for answer in late} == {"queue_full"}
        retry_after = {int(answer.headers["retry-after"]) for answer in late}
        speed = engine.call(lambda: sum(worker.rows_per_s for worker in engine.pool._fleet.serving))  # type: ignore[union-attr]
        assert min(retry_after) >= min(60, 16 * 1000 / speed)  # what runs has to end first
        sampler.release()
        assert [each.result().status_code for each in modest] == [200, 200]
        engine.run(engine.pool.stop())  # the rest would take long
        assert {each.result().status_code for each in flood} <= {200, 429, 503}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 403),  # another name, so another site
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:{port}.example.org"}, 403),
        ({"Host": "example.org"}, 403),
        ({"Host": "example.org", "Origin": "http://example.org"}, 403),  # DNS rebinding
        ({"Host": "localhost.example.org"}, 403),
        ({"Host": "127.0.0.1.example.org"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Host": "127.0.0.1"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(
    server: tuple[Process, httpx.Client], headers: dict[str, str], status: int
) -> None:
    _, client = server
    port = client.base_url.port
    headers = {"Content-Type": "text/plain", "Host": "localhost:{port}"} | headers
    lines = "".join(f"{name}: {value}\r\n".replace("{port}", str(port)) for name, value in headers.items())
    body = '{"class_id": 1, "steps": 1}'
    with connected(client) as sock:
        head = f"POST /generate HTTP/1.1\r\n{lines}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall((head + body).encode())
        raw = read_all(sock)
    assert int(raw.split(b" ")[1]) == status, raw
    if status == 403:
        assert re.search(rb"foreign_(host|origin)", raw)


def test_hosts_and_origins_that_are_allowed() -> None:
    body = {"class_id": 1, "steps": 1}
    with live_server(FakeSampler(), allowed_hosts=("robuq.example.org", "*.internal")) as (client, _):
        for host, status in (
            *(("robuq.example.org", 200), ("robuq.example.org:8443", 200), ("a.internal", 200)),
            *(("internal", 403), ("example.org", 403), ("127.0.0.1", 403)),
        ):
            assert client.post("/generate", json=body, headers={"Host": host}).status_code == status, host
            assert client.get("/info", headers={"Host": host}).status_code == status, host
            assert client.get("/ready", headers={"Host": host}).status_code == 200
        page = {"Host": "robuq.example.org", "Origin": "https://robuq.example.org"}  # a proxy ends TLS
        assert client.post("/generate", json=body, headers=page).status_code == 200
    with live_server(FakeSampler(), host="0.0.0.0") as (client, _):
        assert client.post("/generate", json=body, headers={"Host": "any.example.org"}).status_code == 200
        foreign = {"Host": "any.example.org", "Origin": "https://example.org"}
        assert client.post("/generate", json=body, headers=foreign).status_code == 403


def lines_of(process: Process, *needed: str) -> list[str]:
    """The log's lines with all of these in them, once there is one."""

    def found() -> list[str]:
        return [line for line in process.output.splitlines() if all(text in line for text in needed)]

    until(lambda: bool(found()), every_s=0.02)
    return found()


def test_the_log_names_the_peer_and_what_a_trusted_proxy_says() -> None:
    with serving("--trusted-proxies", "127.0.0.2") as (process, client):
        address = (client.base_url.host, client.base_url.port or 80)
        for source, forwarded in (("127.0.0.2", "203.0.113.7"), ("127.0.0.3", None)):
            with socket.create_connection(address, WAIT_S, (source, 0)) as sock:
                port = sock.getsockname()[1]
                head = "GET /nowhere HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 203.0.113.7\r\n"
                sock.sendall(f"{head}X-Request-Id: from-{source}\r\nConnection: close\r\n\r\n".encode())
                read_all(sock)
            line = json.loads(lines_of(process, f"from-{source}")[0])
            assert line["peer"] == f"{source}:{port}"
            assert line.get("forwarded_for") == forwarded
        with connected(client) as sock:
            peer = "{}:{}".format(*sock.getsockname())
            sock.sendall(b"nonsense\r\n\r\n")
            read_all(sock)
        assert json.loads(lines_of(process, "invalid_http")[0])["peer"] == peer


def test_nothing_forges_a_line_of_the_log_and_upgrades_are_quiet(tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.json", "admin", scopes=["admin"])
    options = ("--api-keys-file", str(tmp_path / "keys.json"), "--checkpoint-dir", str(tmp_path))
    with serving(*options) as (process, client):
        forged = "x\n{}\x1b[31m\u2028{}"
        client.post("/admin/checkpoint", json={"path": forged}, headers={"X-API-Key": key})
        client.get("/a%0a{}", headers={"X-API-Key": key})
        client.get("/info", headers={"Connection": "Upgrade", "Upgrade": "websocket", "X-API-Key": key})
        lines_of(process, "/info")
        log = process.output
        assert all(json.loads(line)["message"] for line in log.splitlines())
        assert not re.search(r"[^\n -~]", log)
        assert "upgrade" not in log.lower() + process.error_output.lower()
