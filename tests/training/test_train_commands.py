"""Commands of training as a shell gives them: their programs, options and files, on a run of some seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import REPOSITORY, state_of, write_config
from tiny_study import write_study
from typer.testing import CliRunner

from train.ablations.study import load_study
from train.cli import app
from train.config import load_config
from train.memory import memory_table, time_line

pytestmark = pytest.mark.slow


def run(*words: str | Path, code: int = 0) -> str:
    """What it prints; its errors where it is to end with another ``code``."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_memory_prints_the_table(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"teacher": {"batch_size": 8}})
    config = load_config(path, [])
    assert run("memory", "-c", path) == memory_table(config, "qat", 1) + "\n" + time_line(config, "qat", 1, 51) + "\n"
    words = ("--stage", "teacher", "--processes", "2", "--teraflops", "3", "--set", "teacher.accumulate=2")
    printed = run("memory", "-c", path, *words)
    config = load_config(path, ["teacher.accumulate=2"])
    assert printed == memory_table(config, "teacher", 2) + "\n" + time_line(config, "teacher", 2, 3) + "\n"
    errors = run("memory", "-c", path, "--stage", "export", code=2)
    assert errors == "error: stage 'export': not one of teacher, warmup, qat\n"


def test_ablate_trains_a_study_and_writes_its_tables(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    words = ("ablate", "-c", path, "-o", tmp_path / "out", "--report", tmp_path / "report")
    printed = run(*words).splitlines()
    assert printed[-1] == f"wrote {tmp_path / 'report' / 'ablations.md'}"
    page = (tmp_path / "report" / "ablations.md").read_text()
    assert all(row.name in page for row in load_study(path).rows)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.json")}
    assert made
    run(*words)
    assert {file: file.stat().st_mtime_ns for file in made} == made, "what is done is left alone"
    errors = run("ablate", "-c", tmp_path / "none.yaml", code=2)
    assert len(errors.splitlines()) == 1


def test_torchrun_trains_in_two_processes(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    run("prepare", "-c", path)
    # A free port is torchrun's to find: others may train on this machine.
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--no-python", "robuq-train", "teacher", "-c", path]
    # The user's own train.py must not be taken for the package.
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')\n")
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": search}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    state = state_of(load_config(path, []))
    assert state.step == 6
    assert [start["processes"] for start in state.history] == [2]
    records = (tmp_path / "run" / "teacher.log.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2, 3, 4, 5, 6], "the first process alone writes"
