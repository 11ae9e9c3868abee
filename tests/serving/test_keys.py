"""API keys: the file, who may change it, a server that cannot read it; the windows of a key's limits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from serving_harness import live_server, sample
from typer.testing import CliRunner

from robuq_core.errors import UserError
from server.access import WINDOW_S, RateLimits
from server.cli import app
from server.errors import ApiError
from server.fake import FakeSampler
from server.keys import ApiKey, KeyStore, create_key, read_keys, revoke_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_file_holds_a_hash_and_no_key_and_is_its_owners(path: Path) -> None:
    key = create_key(path, "alice", scopes=("generate", "admin"), images_per_minute=30)
    text = path.read_text()
    assert key.removeprefix("robuq_") not in text
    (entry,) = read_keys(path)
    assert entry.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert (entry.name, entry.scopes, entry.images_per_minute) == ("alice", ("generate", "admin"), 30)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [child.name for child in path.parent.iterdir()] == ["keys.json"]


def test_writers_at_the_same_time_lose_no_key(path: Path) -> None:
    names = {f"k{i}" for i in range(24)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: create_key(path, name), names))
    assert {key.name for key in read_keys(path)} == names


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda content: content | {"version": 2}, "version"),
        (lambda content: content | {"keys": [{}]}, "keys.0"),
        (lambda content: content | {"keys": [content["keys"][0] | {"scopes": ["root"]}]}, "scopes"),
        (lambda content: content | {"keys": [content["keys"][0] | {"images_per_minute": 0}]}, "images_per_minute"),
        (lambda content: content | {"keys": content["keys"] * 2}, "alice"),
        (lambda content: [], "content"),
    ],
)
def test_a_wrong_file_is_told_by_field(path: Path, change: object, where: str) -> None:
    create_key(path, "alice")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(UserError, match=where) as caught:
        KeyStore(path)
    assert str(path) in str(caught.value)


def test_the_store_follows_its_file(path: Path) -> None:
    first = create_key(path, "first")
    store = KeyStore(path)
    second = create_key(path, "second")
    entry = store.find(second)
    assert entry is not None
    assert entry.name == "second"
    revoke_key(path, "first")
    assert store.find(first) is None
    assert store.find("") is store.find("nonsense") is store.find("ключ") is None


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@AS_ROOT
def test_owner_group_and_mode_stay(path: Path) -> None:
    create_key(path, "alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    os.chown(path, 10001, 10002)
    path.chmod(0o664)  # more than the umask leaves
    for words in (["create", "bob"], ["revoke", "alice"]):
        done = CliRunner().invoke(app, ["keys", *words, "--api-keys-file", str(path)])
        assert done.exit_code == 0
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (10001, 10002, 0o664)
    assert [key.name for key in read_keys(path)] == ["bob"]


@AS_ROOT
def test_a_caller_who_cannot_keep_the_owner_changes_nothing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder, "keys.json")
        create_key(path, "alice")
        path.chmod(0o666)
        before = path.read_bytes()
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="owner") as refused:
                revoke_key(path, "alice")
        finally:
            os.seteuid(0)
        assert str(path) in str(refused.value)
        assert path.read_bytes() == before
        assert [child.name for child in path.parent.iterdir()] == ["keys.json"]


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "keys"
    path.symlink_to(Path("real", "keys"))
    create_key(path, "alice")
    create_key(target, "bob")
    revoke_key(path, "alice")
    assert path.is_symlink()
    assert [key.name for key in read_keys(target)] == ["bob"]


def test_a_file_that_cannot_be_read_keeps_its_keys_for_a_while_and_one_that_is_gone_does_not(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"X-API-Key": create_key(path, "alice")}
    good = path.read_bytes()
    with live_server(FakeSampler(), api_keys_file=path) as (client, engine), caplog.at_level(logging.ERROR):

        def seen() -> tuple[int, int, str, int]:
            """Of the key, of /ready and its word, and how many errors have been logged."""
            ready, info = client.get("/ready"), client.get("/info", headers=headers)
            logged = [record for record in caplog.records if record.name == "server.keys"]
            return info.status_code, ready.status_code, ready.json()["status"], len(logged)

        open_, closed = (200, 200, "ready"), (401, 503, "keys_unreadable")
        path.write_text("{")  # a typing mistake
        assert seen() == seen() == (*open_, 1)  # not one with every request
        assert sample(engine, "robuq_api_keys_unreadable_seconds") > 0
        monkeypatch.setattr("server.keys.GRACE_S", 0.0)
        assert seen() == seen() == (*closed, 2)
        assert client.get("/health").status_code == 200  # a restart would not help
        path.write_bytes(good)
        assert seen() == (*open_, 2)
        assert sample(engine, "robuq_api_keys_unreadable_seconds") == 0
        monkeypatch.undo()
        path.unlink()
        assert seen() == (*closed, 3)  # at once
        assert str(path) in caplog.text
        path.write_bytes(good)
        assert seen() == (*open_, 3)


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now = 1.8e9

    def __call__(self) -> float:
        return self.now


def key_of(images_per_minute: int | None, requests_per_minute: int | None = None, name: str = "k") -> ApiKey:
    return ApiKey(
        name=name,
        sha256="0" * 64,
        images_per_minute=images_per_minute,
        requests_per_minute=requests_per_minute,
        created=datetime.now(UTC),
    )


REQUESTS = st.lists(st.tuples(st.floats(0.001, 70), st.integers(1, 16)), min_size=1, max_size=40)


@settings(max_examples=150)
@given(requests=REQUESTS, limit=st.integers(1, 40))
def test_no_minute_holds_more_than_the_limit_and_retry_after_holds(
    requests: list[tuple[float, int]], limit: int
) -> None:
    clock = Clock()
    rates, key = RateLimits(clock), key_of(limit)
    taken: list[tuple[float, int]] = []
    for wait, cost in requests:
        assume(cost <= limit)
        clock.now += wait
        try:
            rates.check(key, "images", cost)
        except ApiError as error:
            seconds = int(error.headers["Retry-After"])
            assert 1 <= seconds <= WINDOW_S
            recent = sum(images for at, images in taken if at > clock.now - WINDOW_S)
            assert recent + cost > limit, "refused although there was room"
            clock.now += seconds + 0.0005
            rates.check(key, "images", cost)
        rates.charge(key, "images", cost)
        taken.append((clock.now, cost))
    # Seconds since 1970 resolve a quarter of a microsecond: what is just 60 s old may fall on either side.
    for end, _ in taken:
        assert sum(images for at, images in taken if end - WINDOW_S + 1e-6 < at <= end) <= limit


def test_the_units_and_the_keys_are_apart() -> None:
    rates = RateLimits(Clock())
    one, other = key_of(2, 1, "one"), key_of(2, 1, "other")
    rates.charge(one, "images", 2)
    rates.check(one, "requests")
    rates.check(other, "images", 2)
    with pytest.raises(ApiError, match="2 images"):
        rates.check(one, "images")
