"""What every answer tells browsers, what no answer tells anybody, bodies that come slowly or in too many pieces."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from serving_harness import WatchedSampler, live_server, make_settings
from test_authentication import METHODS
from test_connection_limits import connected, read_all

from server import middleware
from server.app import create_app
from server.fake import FakeSampler
from server.metrics import Metrics
from server.pool import Pool

DRAW = {"class_id": 1, "steps": 1}
# What an answer must not hold: the place of a file, a line of a traceback, the name and version of a library.
TELLTALES = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/(home|tmp|opt|usr)/|uvicorn|starlette|fastapi|pydantic|secret", re.I
)


def make_app(**options: object) -> FastAPI:
    settings = make_settings(**options)
    return create_app(Pool(settings, Metrics(4)), settings)


@pytest.mark.parametrize("path", ["/", "/info", "/metrics", "/nowhere", "/health", "/openapi.json", "/generate"])
def test_headers_for_browsers_on_every_answer_once(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert "server" not in answer.headers
    for name, value in {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "content-security-policy": middleware.CONTENT_SECURITY_POLICY,
    }.items():
        assert answer.headers.get_list(name) == [value]
    assert "unsafe" not in middleware.CONTENT_SECURITY_POLICY


def test_a_page_of_another_site_cannot_make_a_browser_draw_unseen(client: httpx.Client) -> None:
    # What fetch(..., {mode: "no-cors", body: "text"}) and a form send: no preflight goes before them.
    sent = {"Content-Type": "text/plain", "Origin": "https://example.org", "Sec-Fetch-Mode": "no-cors"}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        answer = client.post("/generate", json=DRAW, headers=sent | {"Sec-Fetch-Site": site})
        assert answer.status_code == status, site
    assert client.get("/info", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link
    with live_server(FakeSampler(), cors_origins=("https://example.org",)) as (named, _):
        headers = {"Origin": "https://example.org", "Sec-Fetch-Site": "cross-site"}
        assert named.post("/generate", json=DRAW, headers=headers).status_code == 200
        headers["Origin"] = "https://example.com"
        assert named.post("/generate", json=DRAW, headers=headers).json()["error"]["code"] == "foreign_origin"


def test_named_sites_may_call_and_read_what_they_need(tmp_path: Any) -> None:
    from server.keys import create_key

    keys = tmp_path / "keys.json"
    key = create_key(keys, "page", images_per_minute=5)
    with live_server(FakeSampler(), cors_origins=("https://example.org",), api_keys_file=keys) as (client, _):
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = client.options("/generate", headers={"Origin": "https://example.org", **asked})
        assert preflight.status_code == 200  # a browser sends no key with it
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        headers = {"Origin": "https://example.org", "X-API-Key": key}
        answer = client.post("/generate", json=DRAW, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert "access-control-allow-credentials" not in answer.headers
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"x-seed", "x-request-id", "retry-after"} <= exposed
        refused = client.post("/generate", json=DRAW, headers={"Origin": "https://example.org"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://example.org")
        other = client.post("/generate", json=DRAW, headers=headers | {"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
        assert client.options("/generate", headers={"Origin": "https://example.com", **asked}).status_code == 400


def test_no_answer_tells_of_the_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {13}
    bodies: list[Any] = [b"", b"{", b"\xff", b"[]", b'{"class_id": 1e999}', b'{"class_id": 1, "seed": 13}', b'{"a": 1}',
                         b'{"path": "../../etc/passwd"}', b"x" * 70_000]  # fmt: skip
    with live_server(sampler) as (client, engine):
        paths = [
            *(context.path for context in iter_route_contexts(make_app().routes)),
            "/nowhere",
            "/%00",
            "/web/..%2f",
        ]

        def provoke() -> int:
            asked = 0
            for path in paths:
                for method in METHODS:
                    target = re.sub(r"\{[^}]*\}", "..%2f..%2fetc%2fpasswd", path)
                    for body in bodies if method == "POST" else [b""]:
                        answer = client.request(method, target, content=body, headers={"Accept": "*/*"})
                        asked += 1
                        told = answer.text if answer.is_error else ""
                        told += str({k: v for k, v in answer.headers.items() if k != "content-security-policy"})
                        assert not TELLTALES.search(told), (method, target, body[:40], told)
                        assert answer.is_success or "error" in answer.text or method == "HEAD"
            return asked

        assert provoke() > 100

        def broken(*_: object, **__: object) -> None:
            raise LookupError(f"secret of {__file__}")

        # Whatever a route reaches for now raises; whatever it answers must not say what.
        monkeypatch.setattr(engine.pool, "submit", broken)
        monkeypatch.setattr(engine.metrics, "render", broken)
        provoke()
        answer = client.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


def test_a_body_that_comes_too_slowly_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 1.0)
    with live_server(FakeSampler()) as (client, engine), connected(client) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{")
        raw = read_all(sock)
        assert raw.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "body_timeout"' in raw
        assert engine.idle
        # The limit is on the body alone, not on the answer.
        slow = WatchedSampler(step_s=0.05)
        body = json.dumps(DRAW | {"steps": 30}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with live_server(slow) as (patient, _), connected(patient) as sock:
            sock.sendall(head.encode() + body)  # at once, which httpx does not
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_waits_for_100_is_told_before_it_sends(client: httpx.Client) -> None:
    with connected(client) as sock:
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 999999\r\n\r\n"
        sock.sendall(head)
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
        sock.shutdown(socket.SHUT_RDWR)
