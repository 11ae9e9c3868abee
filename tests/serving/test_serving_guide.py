"""The guides of the server against the code: their error codes are those of the server, their examples run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_harness import live_server

from server import errors
from server.fake import FakeSampler

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "http-api.md").read_text()
GUIDE = (ROOT / "docs" / "serving.md").read_text() + API


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live_server(FakeSampler(step_s=0.05)) as (client, _):
        yield client


def codes_in_the_source() -> set[str]:
    """Every code that is written out in an ApiError, or stands in a table of codes."""
    codes = set(errors._HTTP_CODES.values())
    for path in (ROOT / "server").rglob("*.py"):
        codes.update(re.findall(r"\bApiError\(\s*[\w.]+,\s*\"(\w+)\"", path.read_text()))
    text = (ROOT / "server" / "errors.py").read_text()
    codes.update(re.findall(r"code = \"(\w+)\" if .* else \"(\w+)\"", text)[0])
    return codes


def test_the_codes_of_errors() -> None:
    rows = [line.split("|")[1:3] for line in API[API.index("| Status | Code |") :].splitlines() if "`" in line]
    listed = {code: int(status) for status, names in rows for code in re.findall(r"`(\w+)`", names)}
    source = codes_in_the_source()
    assert len(source) > 15
    assert set(listed) == source
    for path in (ROOT / "server").rglob("*.py"):
        for status, code in re.findall(r"\bApiError\(\s*(\d+),\s*\"(\w+)\"", path.read_text()):
            assert listed[code] == int(status), code


def test_metrics_that_pages_name_exist(client: httpx.Client) -> None:
    there = set(re.findall(r"^# HELP (\S+)", client.get("/metrics").text, re.M))
    monitoring = (ROOT / "docs" / "monitoring.md").read_text()
    named = set(re.findall(r"`(robuq_\w+)`", GUIDE + monitoring))
    assert len(named) > 8
    assert named <= there


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.S | re.M)


@pytest.mark.slow  # one needs the package openai
@pytest.mark.parametrize("example", examples("python"), ids=["sse", "openai"])
def test_examples_in_python_run(example: str, client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(compile(example.replace("http://localhost:8000", str(client.base_url).rstrip("/")), "example", "exec"), scope)
    if "pictures" in scope:
        pictures = scope["pictures"]
        assert isinstance(pictures, list)
        assert [picture[:4] for picture in pictures] == [b"\x89PNG"] * 2
    else:
        events = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert events[-1] == "image_generation.completed"
        assert {"image_generation.step", "image_generation.partial_image"} <= set(events)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_examples_in_the_shell_run(tmp_path: Path) -> None:
    """Those that talk to a server, and those that make keys; a server with the keys of the guide's last lines."""
    commands = [line for example in examples("sh") for line in example.splitlines()]
    making = [line for line in commands if line.startswith("robuq-serve keys ")]
    asking = [line for line in commands if line.startswith("curl ")]
    assert (len(making), len(asking)) == (5, 8)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    printed = [run(command) for command in making]
    assert all(key.startswith("robuq_") for key in printed[:3])
    assert "prometheus" in printed[3]
    assert "revoked alice" in printed[4]
    admin, reader = printed[1].strip(), printed[2].strip()
    with live_server(FakeSampler(), api_keys_file=tmp_path / "keys.json", checkpoint_dir=tmp_path) as (client, _):
        assert client.get("/metrics", headers={"X-API-Key": reader}).status_code == 200
        environment |= {"KEY": admin, "ADMIN_KEY": admin}
        for command in asking:
            command = command.replace("localhost:8000", str(client.base_url.netloc.decode()))
            if "-H" not in command or "Accept" in command:
                command += f" -H 'X-API-Key: {admin}'"
            answer = run(command.replace("curl ", "curl -sS -w '%{http_code}' "))
            # There is no v2.safetensors here.
            assert answer.endswith("422" if "v2.safetensors" in command else "200"), (command, answer)
    assert (tmp_path / "goldfish.png").read_bytes()[:4] == b"\x89PNG"
