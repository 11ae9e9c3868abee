"""The server writes no file outside /tmp, so that it runs on a read-only root."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving_harness import WAIT_S, until

from server.keys import create_key

ROOT = Path(__file__).parents[2]

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
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", PROGRAM, "--port", "0", "--api-keys-file", str(keys)],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": "/tmp/triton"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^\s\"]+", process.stdout.readline())
        assert found
        with httpx.Client(base_url=found.group(), headers={"X-API-Key": key}, timeout=WAIT_S) as client:

            def ready() -> bool:
                try:
                    return client.get("/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            until(ready)
            assert client.post("/generate", json={"class_id": 1, "steps": 1}).status_code == 200
            (file,) = client.get("/admin/checkpoint").json()["files"]
            assert client.post("/admin/checkpoint", json={"path": file["path"]}).status_code == 200
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["message"] == "stopped"
    written = [line.split(" ", 2)[2] for line in errors.splitlines() if line.startswith("WROTE ")]
    assert [path for path in written if not path.startswith(("/tmp/", "/dev/"))] == []
