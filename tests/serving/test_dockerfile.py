"""The Dockerfile read as a builder would read it, for where there is no Docker to build it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.error
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from serving_harness import WatchedSampler, live_server

from server.keys import create_key

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    name: str
    value: str
    stage: int  # 0 before the first FROM


def parse_dockerfile(text: str) -> list[Instruction]:
    """Instructions with continued lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    instructions: list[Instruction] = []
    stage = 0
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, value = line.strip().partition(" ")
            stage += name == "FROM"
            instructions.append(Instruction(name, " ".join(value.split()), stage))
    return instructions


INSTRUCTIONS = parse_dockerfile((ROOT / "Dockerfile").read_text())
FINAL = max(instruction.stage for instruction in INSTRUCTIONS)


def values(name: str, stage: int | None = FINAL) -> list[str]:
    return [i.value for i in INSTRUCTIONS if i.name == name and stage in (None, i.stage)]


def exec_form(value: str) -> list[str]:
    command = json.loads(value)
    assert isinstance(command, list)
    assert all(isinstance(word, str) for word in command)
    return command


def health_command() -> list[str]:
    (check,) = values("HEALTHCHECK")
    return exec_form(check[check.index("CMD ") + 4 :])


def test_no_compiler_and_no_sources_in_the_final_stage() -> None:
    assert values("RUN") == []
    assert values("COPY") == [f"--from=builder {folder} {folder}" for folder in ("/opt/robuq", "/opt/app")]
    assert any("gcc" in command for command in values("RUN", stage=1))


def test_what_changes_often_comes_last() -> None:
    """A change of the source must not download torch again, nor be a layer that holds it."""
    builder = [f"{i.name} {i.value}" for i in INSTRUCTIONS if i.stage == 1]
    marks = (
        "RUN headers=",
        "RUN pip install --no-deps --require-hashes --requirement requirements.lock",
        "COPY scripts/install-torch.sh",
        "COPY pyproject.toml",
        "RUN python -c",
        "COPY robuq_core",
    )
    places = [next(k for k, line in enumerate(builder) if line.startswith(mark)) for mark in marks]
    assert places == sorted(places)
    (install,) = [line for line in builder if "--target" in line]
    assert install == "RUN pip install --no-deps --no-build-isolation --target /opt/app ."
    assert builder.index(install) > places[-1]


@pytest.mark.parametrize("extras", ["", "vae,hub"])
def test_extras_are_those_of_the_project(extras: str) -> None:
    (step,) = [value for value in values("RUN", stage=1) if "tomllib" in value]
    program = re.search(r'python -c "([^"]+)"', step)
    assert program is not None
    environment = os.environ | {"EXTRAS": extras}
    command = [sys.executable, "-c", program[1]]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = []
    for extra in extras.split(",") if extras else []:
        wanted += project["optional-dependencies"][extra]
    assert result.stdout.split("\n")[:-1] == (wanted or [""])


def test_what_is_always_installed_is_compared_with_its_hash() -> None:
    installs = [
        part.strip() for value in values("RUN", stage=1) for part in re.split("&&|;", value) if "pip install" in part
    ]
    for install in installs:
        by_hash = "--require-hashes" in install
        assert by_hash or "--target /opt/app" in install or "/tmp/requirements.txt" in install, install
    assert sum("--require-hashes" in install for install in installs) == 2


@pytest.mark.parametrize("headers", [True, False])
def test_headers_of_python_are_fetched_where_the_base_has_none(tmp_path: Path, headers: bool) -> None:
    """The kernels are an extension module; Python's own images have them, those of Debian do not."""
    program = re.search(r'headers=\$\(python -c "([^"]+)"\)', values("RUN", stage=1)[0])
    assert program is not None
    if headers:
        (tmp_path / "Python.h").touch()
    fake = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}; exec({program[1]!r})"
    result = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True)
    assert result.stdout.split() == ([] if headers else ["python3-dev"]), result.stderr


def test_the_final_user_is_not_root() -> None:
    user = values("USER")[-1].split(":")[0]
    assert user.isdecimal()
    assert int(user) > 0


def test_the_server_is_started_in_exec_form_so_that_it_gets_sigterm() -> None:
    (command,) = values("CMD")
    assert exec_form(command) == ["robuq-serve", "--host", "0.0.0.0"]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert values("EXPOSE") == ["8000"]


def test_libraries_that_keep_caches_keep_them_in_tmp() -> None:
    variables = dict(pair.split("=", 1) for value in values("ENV") for pair in value.split())
    for name, value in variables.items():
        if name == "HOME" or name.endswith("_DIR"):
            assert value.split("/")[:2] == ["", "tmp"], name
    assert variables["HOME"] == values("WORKDIR")[-1] == "/tmp"
    assert variables["PYTHONDONTWRITEBYTECODE"] == variables["PYTHONUNBUFFERED"] == "1"


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for copy in values("COPY", stage=1):
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            ignored = False
            for rule in rules:
                if fnmatch(source, rule.removeprefix("!")):
                    ignored = not rule.startswith("!")
            assert not ignored, f"{source} is ignored"


def test_the_health_check_passes_while_draining_fails_after_a_failure_and_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create_key(tmp_path / "keys.json", "somebody")
    python, flag, program = health_command()
    assert (python, flag) == ("python", "-c")
    with live_server(WatchedSampler(), api_keys_file=tmp_path / "keys.json") as (client, engine):
        monkeypatch.setenv("ROBUQ_PORT", str(httpx.URL(client.base_url).port))
        exec(compile(program, "healthcheck", "exec"), {})
        engine.begin_drain()
        assert client.get("/ready").status_code == 503
        exec(compile(program, "healthcheck", "exec"), {})
        engine.run(engine.pool.stop())
        with pytest.raises(urllib.error.HTTPError, match="503"):
            exec(compile(program, "healthcheck", "exec"), {})
