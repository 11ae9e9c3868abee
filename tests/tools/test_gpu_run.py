"""``scripts/gpu_run.py``: jobs that fail, hang or run out of time, and a rehearsal of jobs in the emulator."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import until

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("gpu_run")


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


class Scripted:
    """A run whose jobs are lines of Python, by name."""

    def __init__(self, script: ModuleType, out: Path, programs: dict[str, str]) -> None:
        self.run = script.Run(out, False)
        self.run.command = lambda job: [sys.executable, "-c", programs[job.name]]
        self.script = script

    def stages(self, *stages: str, seconds: float = 60, **needed: bool) -> bool:
        jobs = [[self.script.Job(name, 30, needed.get(name, False)) for name in stage.split()] for stage in stages]
        return self.run.part(tuple(map(tuple, jobs)), seconds)


def test_a_job_that_fails_costs_the_others_nothing(tmp_path: Path, script: ModuleType) -> None:
    scripted = Scripted(script, tmp_path, {"bad": "raise OSError('off by 7')", "good": "print('fine')"})
    assert not scripted.stages("bad", "good good")
    ended = [(each["job"], each["code"]) for each in results(tmp_path)]
    assert ended == [("bad", 1), ("good", 0), ("good", 0)]
    log = (tmp_path / "log.txt").read_text()
    assert "off by 7" in log
    assert log.count("fine") == 2


def test_a_needed_job_that_fails_ends_the_run(tmp_path: Path, script: ModuleType) -> None:
    scripted = Scripted(script, tmp_path, {"smoke": "exit(3)", "good": ""})
    assert not scripted.stages("smoke", "good", smoke=True)
    assert [each.get("job") for each in results(tmp_path)] == ["smoke", None]
    assert scripted.stages("good")


def test_a_job_that_hangs_is_killed_with_what_it_started(tmp_path: Path, script: ModuleType) -> None:
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    scripted = Scripted(script, tmp_path, {"hangs": f"{child}; print(p.pid, flush=True); time.sleep(600)"})
    assert not scripted.run.run(script.Job("hangs", 600), 15)
    assert results(tmp_path)[0]["code"] == "out of time"
    pid = (tmp_path / "log.txt").read_text().split()[0]
    state = Path("/proc", pid, "stat")
    until(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_run_without_time_left_is_recorded(tmp_path: Path, script: ModuleType) -> None:
    scripted = Scripted(script, tmp_path, {"good": ""})
    assert not scripted.stages("good", seconds=1)
    assert [each["event"] for each in results(tmp_path)] == ["stopped"]


def test_every_job_of_the_parts_is_there(script: ModuleType) -> None:
    from gpu_jobs import JOBS

    planned = {job.name for _, stages in script.PARTS.values() for stage in stages for job in stage}
    assert planned | {"launches"} == set(JOBS)
    # Beside others only jobs that time nothing.
    for _, stages in script.PARTS.values():
        beside = {job.name for stage in stages if len(stage) > 1 for job in stage}
        assert not beside & {"ops", "forwards", "forwards_fp32", "forwards_bf16", "tune"}


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    """The rest takes minutes: ``python scripts/gpu_run.py a --rehearse``."""
    jobs = ["machine", "smoke", "attention", "graphs", "forwards", "tune"]
    for part in "ab":
        command = [sys.executable, str(SCRIPTS / "gpu_run.py"), part, "--rehearse", "--out", str(tmp_path), "--jobs"]
        done = subprocess.run([*command, *jobs], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    found = results(tmp_path)
    assert {each["job"] for each in found if each.get("event") == "end"} == set(jobs)
    sides = [each for each in found if "side" in each]
    assert {each["rows"] for each in sides} == {1, 2}
    table = json.loads((tmp_path / "triton" / "rehearsal.json").read_text())
    assert list(table) == ["ternary_linear rows=16 N=40 K=36 rank=16"]  # both shapes of a rehearsal
