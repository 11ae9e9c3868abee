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

import httpx
import pytest
from serving_harness import WatchedSampler, live_server

from server.keys import create_key

ROOT = Path(__file__).parents[2]
BUILDER, FINAL = 1, 2


def instructions() -> list[tuple[int, str, str]]:
    """Stage (0 before the first FROM), name and value; continued lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found, stage = [], 0
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, value = line.strip().partition(" ")
            stage += name == "FROM"
            found.append((stage, name, " ".join(value.split())))
    return found


def values(name: str, stage: int = FINAL) -> list[str]:
    return [value for at, each, value in instructions() if (at, each) == (stage, name)]


def test_the_final_stage_has_no_compiler_no_source_and_no_root() -> None:
    assert values("RUN") == []
    assert values("COPY") == [f"--from=builder {folder} {folder}" for folder in ("/opt/robuq", "/opt/app")]
    assert int(values("USER")[-1].split(":")[0]) > 0
    # In exec form, so that the server gets SIGTERM.
    assert json.loads(values("CMD")[0]) == ["robuq-serve", "--host", "0.0.0.0"]
    assert (values("STOPSIGNAL"), values("EXPOSE")) == (["SIGTERM"], ["8000"])
    variables = dict(pair.split("=", 1) for value in values("ENV") for pair in value.split())
    caches = {value for name, value in variables.items() if name == "HOME" or name.endswith("_DIR")}
    assert all(value.split("/")[:2] == ["", "tmp"] for value in caches)


def test_what_changes_often_comes_last() -> None:
    """A change of the source must not download torch again, nor be a layer that holds it."""
    builder = [f"{name} {value}" for stage, name, value in instructions() if stage == BUILDER]
    marks = (
        *("RUN headers=", "RUN pip install --no-deps --require-hashes --requirement requirements.lock"),
        *("COPY scripts/install-torch.sh", "COPY pyproject.toml", "RUN python -c", "COPY robuq_core"),
        "RUN pip install --no-deps --no-build-isolation --target /opt/app .",
    )
    places = [next(k for k, line in enumerate(builder) if line.startswith(mark)) for mark in marks]
    assert places == sorted(places)


@pytest.mark.parametrize("extras", ["", "vae,hub"])
def test_extras_are_those_of_the_project(extras: str) -> None:
    (step,) = [value for value in values("RUN", BUILDER) if "tomllib" in value]
    program = re.search(r'python -c "([^"]+)"', step)
    assert program is not None
    command = [sys.executable, "-c", program[1]]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"EXTRAS": extras}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [name for extra in extras.split(",") if extra for name in project["optional-dependencies"][extra]]
    assert result.stdout.split("\n")[:-1] == (wanted or [""])


def test_what_is_always_installed_is_compared_with_its_hash() -> None:
    parts = [part for value in values("RUN", BUILDER) for part in re.split("&&|;", value) if "pip install" in part]
    by_hash = ["--require-hashes" in part for part in parts]
    others = [part for part in parts if "--require-hashes" not in part]
    assert sum(by_hash) == 2
    assert all("--target /opt/app" in part or "/tmp/requirements.txt" in part for part in others)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for source in (source for copy in values("COPY", BUILDER) for source in copy.split()[:-1]):
        assert (ROOT / source).exists(), source
        matching = [rule for rule in rules if fnmatch(source, rule.removeprefix("!"))]
        assert not matching or matching[-1].startswith("!"), f"{source} is ignored"


def test_the_health_check_passes_while_draining_fails_after_a_failure_and_needs_no_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create_key(tmp_path / "keys.json", "somebody")
    (check,) = values("HEALTHCHECK")
    python, flag, program = json.loads(check[check.index("CMD ") + 4 :])
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
