"""Who gets in: keys, scopes, limits; what every answer tells browsers and none tells anybody."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_harness import Engine, WatchedSampler, live_server, make_settings, until
from test_connection_limits import connected, read_all
from test_keys import Clock

from server import middleware
from server.access import RateLimits, is_public
from server.app import create_app
from server.fake import FakeSampler
from server.keys import create_key, revoke_key
from server.logs import JsonFormatter
from server.metrics import Metrics
from server.pool import Pool
from server.request import Overloaded

# Whoever adds to this list opens a route to the whole world.
OPEN = {"/", "/docs", "/web/{name}", "/health", "/ready"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
DRAW = {"class_id": 1, "steps": 1}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    create_key(path, "somebody")
    return path


@pytest.fixture
def guarded(keys_file: Path) -> Iterator[tuple[httpx.Client, Engine]]:
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, engine):
        yield client, engine


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def code_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    code: str = error["code"] if isinstance(error, dict) else answer.json()["code"]
    return code


def all_routes(keys_file: Path | None) -> list[str]:
    options = make_settings(api_keys_file=keys_file)
    app = create_app(Pool(options, Metrics(4)), options)
    return [context.path for context in iter_route_contexts(app.routes)]


def test_no_route_answers_without_a_key_but_those_that_are_listed(
    guarded: tuple[httpx.Client, Engine], keys_file: Path
) -> None:
    client, _ = guarded
    paths = all_routes(keys_file)
    assert {"/generate", "/info", "/metrics", "/openapi.json", "/admin/checkpoint"} <= set(paths)
    for path in paths:
        concrete = re.sub(r"\{[^}]*\}", "x", path)
        for method in METHODS:
            status = client.request(method, concrete).status_code
            assert (status == 401) == (path not in OPEN), f"{method} {path}: {status}"


SEGMENTS = st.sampled_from(
    ["generate", "admin", "checkpoint", "info", "metrics", "health", "ready", "v1", "v2", "web", "docs", "..", ".", "",
     "%2e%2e", "%2fadmin", "health%00", "Health", "x" * 50, "openapi.json", "images", "generations", "%00"]
)  # fmt: skip
CHECK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CHECK
@given(segments=st.lists(SEGMENTS, max_size=5), method=st.sampled_from(METHODS))
def test_no_spelling_of_a_path_gets_past_the_keys(
    guarded: tuple[httpx.Client, Engine], segments: list[str], method: str
) -> None:
    client, _ = guarded
    # httpx would tidy the path up; a raw target goes out as it is.
    request = client.build_request(method, "/")
    request.url = request.url.copy_with(raw_path=("/" + "/".join(segments)).encode())
    answer = client.send(request)
    if answer.status_code != 401:
        path = httpx.URL(request.url).path
        assert is_public(path), path
        assert answer.status_code in (200, 404, 405)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic c29tZWJvZHk6"},
        {"X-API-Key": ""},
        {"X-API-Key": "robuq_" + "A" * 43},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_401_for_whatever_is_no_key(guarded: tuple[httpx.Client, Engine], headers: dict[str, Any]) -> None:
    client, engine = guarded
    answer = client.post("/generate", json=DRAW, headers=headers)
    assert (answer.status_code, code_of(answer)) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert engine.metrics.registry.get_sample_value("robuq_rejected_total", {"reason": "unauthorized"}) == 1


def test_both_headers_let_in_and_the_name_of_the_key_is_the_client(keys_file: Path) -> None:
    key = create_key(keys_file, "alice")
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, engine):
        clients: list[str] = []
        submit = engine.pool.submit

        def watched(request: Any) -> Any:
            clients.append(request.client)
            return submit(request)

        engine.pool.submit = watched  # type: ignore[method-assign]
        for headers in (bearer(key), {"authorization": f"bearer  {key}"}, {"X-API-Key": key}):
            assert client.post("/generate", json=DRAW, headers=headers).status_code == 200
        assert clients == ["alice"] * 3
        revoke_key(keys_file, "alice")
        assert client.post("/generate", json=DRAW, headers=bearer(key)).status_code == 401


def test_scopes(guarded: tuple[httpx.Client, Engine], keys_file: Path) -> None:
    client, _ = guarded
    for scope, may in (("read", {"info"}), ("generate", {"info", "draw"}), ("admin", {"info", "admin"})):
        headers = bearer(create_key(keys_file, scope, scopes=[scope]))
        answers = {
            "info": client.get("/info", headers=headers),
            "draw": client.post("/generate", json=DRAW, headers=headers),
            "admin": client.get("/admin/checkpoint", headers=headers),
        }
        for name, answer in answers.items():
            expected = (200, None) if name in may else (403, "forbidden")
            assert (answer.status_code, code_of(answer) if answer.is_error else None) == expected, (scope, name)


def test_the_log_tells_who_asked_and_never_a_key(
    guarded: tuple[httpx.Client, Engine], keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = guarded
    key = create_key(keys_file, "alice")

    def lines() -> list[logging.LogRecord]:
        return [record for record in caplog.records if getattr(record, "path", "") == "/generate"]

    with caplog.at_level(logging.DEBUG):
        for headers in (bearer(key), {"X-API-Key": key}, bearer(key + "x")):
            client.post("/generate", json=DRAW, headers=headers)
        until(lambda: len(lines()) == 3)
    assert [getattr(line, "client", None) for line in lines()] == ["alice", "alice", None]
    assert key not in "\n".join(
        JsonFormatter().format(record) for record in caplog.records if record.name[:6] == "server"
    )


def test_an_open_server_is_closed_to_administrators() -> None:
    with live_server(FakeSampler()) as (client, _):
        assert client.get("/info").status_code == 200
        for method in METHODS:
            for path in ("/admin", "/admin/", "/admin/checkpoint", "/admin/anything"):
                answer = client.request(method, path)
                assert answer.status_code == 403
                assert method == "HEAD" or code_of(answer) == "admin_closed"


def test_images_of_a_minute_are_counted_when_they_are_queued(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(RateLimits.__init__, "__defaults__", (clock, lambda: None))
    key = create_key(keys_file, "alice", images_per_minute=10)
    other = create_key(keys_file, "bob")

    def full(request: object) -> None:
        raise Overloaded(1.0)

    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, engine):

        def draw(images: int, key: str = key) -> httpx.Response:
            return client.post("/generate", json=DRAW | {"num_images": images}, headers=bearer(key))

        assert draw(6).status_code == 200
        clock.now += 9.5
        refused = draw(5)
        assert (refused.status_code, code_of(refused)) == (429, "rate_limited")
        assert refused.headers["retry-after"] == "51"
        assert draw(4).status_code == 200  # what was refused has used nothing up
        assert draw(1).status_code == 429
        never = draw(11)
        assert (never.status_code, never.json()["error"]["field"]) == (422, "num_images")
        assert draw(16, other).status_code == 200
        assert engine.metrics.registry.get_sample_value("robuq_rejected_total", {"reason": "rate_limited"}) == 2
        clock.now += 60
        monkeypatch.setattr(engine.pool, "submit", full)
        assert [draw(10).status_code for _ in range(2)] == [429, 429]
        monkeypatch.undo()
        assert draw(10).status_code == 200  # what the queue refuses costs nothing


def test_requests_of_a_minute_whatever_they_ask(keys_file: Path) -> None:
    key = create_key(keys_file, "alice", requests_per_minute=5)
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, _):
        answers = [client.get("/info", headers=bearer(key)) for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 5
        assert client.post("/generate", json=DRAW, headers=bearer(key)).status_code == 429
        assert client.get("/health", headers=bearer(key)).status_code == 200


def test_blanks_around_a_key_are_not_part_of_it(keys_file: Path) -> None:
    key = create_key(keys_file, "alice")
    with live_server(FakeSampler(), api_keys_file=keys_file) as (client, _):
        for header in (f"X-API-Key: {key} \t", f"X-API-Key:\t{key}", f"Authorization: Bearer  {key} "):
            with connected(client) as sock:
                sock.sendall(f"GET /info HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n".encode())
                assert read_all(sock).startswith(b"HTTP/1.1 200 "), header


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
