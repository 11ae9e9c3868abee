"""Files that are whole or absent: what is flushed when, and who may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from robuq_core.files import flush, replacing


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files come from /proc")
def test_the_content_is_flushed_before_the_rename_and_the_rename_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def replaced(source: str, target: str) -> None:
        calls.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "state.pt") as temporary:
        temporary.write_text("whole")
    assert calls == [("fsync", temporary.name), ("rename", "state.pt"), ("fsync", tmp_path.name)]
    assert (tmp_path / "state.pt").read_text() == "whole"


@pytest.mark.parametrize(
    ("umask", "plain", "secret"), [(0o022, 0o644, 0o600), (0o077, 0o600, 0o600), (0, 0o666, 0o600)]
)
def test_the_umask_is_heeded(tmp_path: Path, umask: int, plain: int, secret: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "plain") as temporary:
            temporary.unlink()  # some libraries make the file anew
            temporary.touch(mode=0o600)
        with replacing(tmp_path / "secret", mode=0o600) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == secret  # before anything is in it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == plain
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == secret


def test_a_file_that_cannot_be_flushed_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "keys.json"
    target.write_text("before")

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"), replacing(target) as temporary:
        temporary.write_text("after")
    assert target.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_folder_that_cannot_be_flushed_on_its_own_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()

    def refused(_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        flush(tmp_path / "file")
