"""The file of API keys: what is in it, who may change it, and when a server notices."""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from robuq_core.errors import UserError
from server.keys import KeyStore, create_key, read_keys, revoke_key


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


def test_a_missing_file_names_the_command_that_makes_it(path: Path) -> None:
    with pytest.raises(UserError, match="robuq-serve keys create"):
        KeyStore(path)


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


def test_a_typing_mistake_locks_nobody_out_and_a_missing_file_everybody(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = create_key(path, "alice")
    store = KeyStore(path)
    good = path.read_text()
    with caplog.at_level(logging.ERROR):
        path.write_text("{")
        assert store.find(key) is not None
        assert store.find(key) is not None
        assert len(caplog.records) == 1  # told once, not with every request
        path.unlink()
        assert store.find(key) is None
    path.write_text(good)
    assert store.find(key) is not None
