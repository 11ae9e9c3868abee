"""The GPU check at tiny sizes in Triton's interpreter: what it would say, and that a failure does not end it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def test_rehearsal(tmp_path: Path) -> None:
    out, parts = tmp_path / "report.json", ["environment", "attention", "dense_linear", "time_linears"]
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), "--parts", *parts]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert list(report) == parts
    assert report["environment"]["backend"] == "triton-interpreted"
    assert report["dense_linear"]["worst_relative_error"] < 1e-6
    assert report["time_linears"]["proj"]["relative_error"] < 1e-5
    # What qkv gives is bfloat16, what proj gives is not.
    assert 1e-4 < report["time_linears"]["qkv"]["narrow_error"] < 2**-8
    assert report["time_linears"]["proj"]["narrow_error"] < 1e-5


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("gpu_check")

    def broken(check: object) -> dict[str, object]:
        raise AssertionError("off by 7")

    def whole(check: object) -> dict[str, object]:
        return {"value": 3}

    monkeypatch.setattr(script, "PARTS", (broken, whole))
    monkeypatch.setattr(script, "Check", lambda rehearse: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "report.json")])
    assert script.main() == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["broken"]["ok"] is False
    assert "off by 7" in report["broken"]["error"]
    assert report["whole"]["ok"] is True
    assert report["whole"]["value"] == 3
    assert "broken: FAILED" in capsys.readouterr().out
