"""The server writes no file outside /tmp, so that it runs on a read-only root."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from process_harness import ROOT, client_of, launch, stop

from server.keys import create_key

# Every call of Python that would change a file system is told on standard error before robuq-serve begins.
PROGRAM = """
import os, sys
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
def watch(event, arguments):
    if event in CHANGES:
        print("WROTE", event, arguments[0], file=sys.stderr, flush=True)
    elif event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            print("WROTE", event, path, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from server.cli import app
app()
"""


@pytest.mark.slow
def test_nothing_is_written_outside_tmp(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = create_key(keys, "root", scopes=["admin", "generate"])
    process = launch(
        *(sys.executable, "-B", "-c", PROGRAM, "--port", "0", "--api-keys-file", keys),
        cwd=Path("/"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": "/tmp/triton"},
    )
    with client_of(process, headers={"X-API-Key": key}) as client:
        assert client.post("/generate", json={"class_id": 1, "steps": 1}).status_code == 200
        file = client.get("/admin/checkpoint").json()["files"][0]
        assert client.post("/admin/checkpoint", json={"path": file["path"]}).status_code == 200
        stop(process)
    assert json.loads(process.output.splitlines()[-1])["message"] == "stopped"
    written = [line.split(" ", 2)[2] for line in process.error_output.splitlines() if line.startswith("WROTE ")]
    assert [path for path in written if not path.startswith(("/tmp/", "/dev/"))] == []
