"""A server process whose file of keys cannot be read for a moment, or for long; who may read it after a change."""

from __future__ import annotations

import os
import re
import resource
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from process_harness import Process, serving
from serving_harness import until
from typer.testing import CliRunner

from robuq_core.errors import UserError
from server.cli import app
from server.keys import create_key, read_keys, revoke_key

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


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


@contextmanager
def guarded(path: Path, at_start: str = "") -> Iterator[tuple[Process, httpx.Client, dict[str, str]]]:
    """A server with the key of alice, and the headers to use it."""
    headers = {"X-API-Key": create_key(path, "alice")}
    with serving("--api-keys-file", str(path), at_start=at_start) as (process, client):
        assert client.get("/info", headers=headers).status_code == 200
        yield process, client, headers


def errors(process: Process, path: Path) -> list[str]:
    return [line for line in process.output.splitlines() if '"error"' in line and str(path) in line]


def unreadable_s(client: httpx.Client, headers: dict[str, str]) -> float:
    found = re.search(r"^robuq_api_keys_unreadable_seconds (\S+)$", client.get("/metrics", headers=headers).text, re.M)
    assert found
    return float(found.group(1))


def test_a_change_that_cannot_be_read_at_first_is_read_later(path: Path) -> None:
    with guarded(path) as (process, client, headers):
        # No file can be opened any more; the connection of the client is open already.
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        revoke_key(path, "alice")
        assert client.get("/info", headers=headers).status_code == 200
        until(lambda: len(errors(process, path)) == 1)
        assert client.get("/info", headers=headers).status_code == 200
        assert client.get("/ready").status_code == 200  # for a moment
        assert unreadable_s(client, headers) > 0
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        assert client.get("/info", headers=headers).status_code == 401
        headers = {"X-API-Key": create_key(path, "bob")}
        assert unreadable_s(client, headers) == 0
        assert len(errors(process, path)) == 1  # not one with every request


def test_a_file_that_stays_unreadable_or_is_gone_closes_the_server_until_it_is_read(path: Path) -> None:
    with guarded(path, at_start="import server.keys; server.keys.GRACE_S = 0.3") as (process, client, headers):
        good = path.read_bytes()
        path.with_name("folder").mkdir()
        path.unlink()
        path.with_name("folder").rename(path)  # root may read any file, but no folder
        # A probe is enough to notice.
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json() == {"status": "keys_unreadable"}
        assert client.get("/health").status_code == 200  # a restart would not help
        assert client.get("/info", headers=headers).status_code == 401
        assert len(errors(process, path)) >= 1  # one when it begins, one when it closes
        path.rmdir()
        path.write_bytes(good)
        assert client.get("/info", headers=headers).status_code == 200
        assert client.get("/ready").status_code == 200
        assert unreadable_s(client, headers) == 0
        path.unlink()
        assert client.get("/info", headers=headers).status_code == 401  # at once
        assert client.get("/ready").json() == {"status": "keys_unreadable"}
        assert "rejected" in errors(process, path)[-1]
        path.write_bytes(good)
        assert client.get("/info", headers=headers).status_code == 200
