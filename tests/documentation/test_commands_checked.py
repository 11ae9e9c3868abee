"""Commands of the documentation as far as their own programs go without the network: help, and dry runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import ALL, ROOT
from test_commands_parse import PROJECT, console_script
from typer.testing import CliRunner

# A target of make, and what it would run at last.
MAKES = {
    "serve": ".venv/bin/robuq-serve --host 127.0.0.1 --port 8000",
    "test": ".venv/bin/pytest",
    "loadtest": "--rate 2,5,10 --duration 10",
    "docs": ".venv/bin/mkdocs build --strict",
    "sbom": ".venv/bin/python scripts/sbom.py --out dist/sbom.cdx.json",
    "dist": ".venv/bin/python -m build",
}


@pytest.mark.parametrize("program", PROJECT["scripts"])
def test_help_is_printed(program: str) -> None:
    result = CliRunner().invoke(console_script(program), ["--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("target", MAKES)
def test_make_would_run(target: str, tmp_path: Path) -> None:
    """In a folder without an environment: it makes one first."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    # Of its own: the make that may have started the tests hands on its level, flags and variables.
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["make", "-n", target], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == "python3 -m venv .venv"
    assert lines[2].startswith(".venv/bin/pip install --quiet --constraint constraints.txt --editable ")
    assert lines[-1].endswith(MAKES[target])


def test_every_target_that_is_shown_is_tried() -> None:
    assert {word for command in ALL if command.words[0] == "make" for word in command.words[1:]} <= set(MAKES)


def test_pip_would_install(tmp_path: Path) -> None:
    """The project builds its metadata as pip asks for them, and they have the extras that are shown."""
    lines = [command for command in ALL if command.words[:2] == ("pip", "install")]
    wanted = {word for command in lines for word in command.words[2:]}
    assert {"."} < wanted
    assert all(word.startswith(".") for word in wanted)
    extras = sorted({extra for word in wanted for extra in word[1:].strip("[]").split(",") if extra})
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--report", tmp_path / "report.json"]
    done = subprocess.run([*command, *offline, f".[{','.join(extras)}]"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "report.json").read_text())["install"]
    assert found["metadata"]["name"] == "robuq"
    assert set(found["requested_extras"]) == set(extras) <= set(found["metadata"]["provides_extra"])
