"""Ids of the hub through its own library and a socket: `robuq inspect` in a process of its own, and a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, hub
from tiny import TINY, write_tiny

from robuq_core.export_hub import export_hub

ROOT = Path(__file__).parents[2]
MAIN, OLD = "a" * 40, "b" * 40


@dataclass
class Online:
    """The stand-in, and what one asks it with."""

    folder: Path
    address: str
    asked: list[str]

    def inspect(self, source: str, **variables: str) -> tuple[int, str, str]:
        """Exit code, output and the last line of errors; bars of the hub's library may stand above it."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": self.address,
            **variables,
        }
        command = [sys.executable, "-c", "from robuq_core.cli import app; app()", "inspect", source]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]

    def files(self) -> set[str]:
        """What was downloaded."""
        return {path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path}


@pytest.fixture
def online(tmp_path: Path) -> Iterator[Online]:
    commits = {name: tmp_path / name for name in (MAIN, OLD)}
    write_tiny(tmp_path / "tiny.safetensors")
    write_tiny(tmp_path / "old.safetensors", TINY.model_copy(update={"depth": 1}))
    export_hub(tmp_path / "tiny.safetensors", commits[MAIN], licence="mit")
    export_hub(tmp_path / "old.safetensors", commits[OLD], licence="mit")
    (commits[MAIN] / "samples.bin").write_bytes(bytes(1000))
    with hub(commits, {"main": MAIN, "v0": OLD}) as (address, asked):
        yield Online(tmp_path, address, asked)


def test_an_id_is_downloaded_once_and_without_what_is_not_needed(online: Online) -> None:
    code, told, errors = online.inspect("someone/tiny")
    assert (code, "depth 2" in told) == (0, True), errors
    assert online.files() == {"config.json", "tiny.safetensors"}
    online.asked.clear()
    assert online.inspect("someone/tiny")[:2] == (0, told)
    assert online.files() == set()


def test_a_revision_is_that_one_and_a_token_opens_what_is_private(online: Online) -> None:
    for revision in ("v0", OLD):
        code, told, errors = online.inspect(f"someone/tiny@{revision}")
        assert (code, "depth 1" in told) == (0, True), errors
    assert online.files() == {"config.json", "old.safetensors"}
    assert online.inspect("someone/private", HF_TOKEN=TOKEN)[0] == 0


@pytest.mark.parametrize(
    ("source", "token", "told"),
    [
        ("someone/absent", "", "someone/absent: no such file or folder, and no such repository on the hub"),
        ("someone/tiny@v9", "", "someone/tiny@v9: the repository has no such revision"),
        ("someone/private", "", "someone/private: no such file or folder, and the hub refuses access; run hf auth"),
        ("someone/private", "hf_of_another", "the hub refuses access; run hf auth login, or check HF_TOKEN"),
        ("someone/gated", "", "someone/gated: the hub only serves approved accounts"),
    ],
)
def test_what_it_refuses_is_one_line(online: Online, source: str, token: str, told: str) -> None:
    code, printed, error = online.inspect(source, **({"HF_TOKEN": token} if token else {}))
    assert (code, printed) == (2, "")
    assert error.startswith("error: ")
    assert told in error
    assert online.files() == set()
