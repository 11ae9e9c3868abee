"""The built image in a container, with the rights that docs/deployment.md leaves it.

It takes a container engine and an image, so name both; docker is the default engine:

    docker build -t robuq-serve .
    ROBUQ_TEST_IMAGE=robuq-serve CONTAINER_ENGINE=podman pytest tests/serving/deploy/test_image.py
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO

import httpx
import pytest
from PIL import Image

IMAGE = os.environ.get("ROBUQ_TEST_IMAGE", "")
ENGINE = os.environ.get("CONTAINER_ENGINE", "docker")
RESTRICTED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
START_S, DRAIN_S = 60.0, 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGE, reason="needs a container engine and a built image; set ROBUQ_TEST_IMAGE"),
]


class Container:
    """One that runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        address = engine("port", name, "8000/tcp").splitlines()[0]
        self.client = httpx.Client(base_url=f"http://{address}", timeout=DRAIN_S)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ENGINE, "exec", self.name, *command], capture_output=True, text=True)

    def python(self, program: str) -> str:
        result = self.run("python", "-c", program)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def exit_code(self) -> int:
        return int(engine("inspect", "--format", "{{.State.ExitCode}}", self.name))


def engine(*command: str) -> str:
    result = subprocess.run([ENGINE, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@contextmanager
def started(*options: str) -> Iterator[Container]:
    """A container of the image that is ready; it and its output are gone afterwards."""
    name = engine("run", "--detach", "--publish", "127.0.0.1::8000", *options, IMAGE)
    try:
        container = Container(name)
        until = time.monotonic() + START_S
        while not answers(container.client):
            assert time.monotonic() < until, subprocess.run([ENGINE, "logs", name], capture_output=True).stderr
            time.sleep(0.2)
        yield container
    finally:
        engine("rm", "--force", name)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    with started(*RESTRICTED) as container:
        yield container


def test_it_draws(container: Container) -> None:
    info = container.client.get("/info").json()
    assert info["backend"] != "reference"
    answer = container.client.post("/generate", json={"class_id": 207, "seed": 7}, headers={"Accept": "image/png"})
    assert answer.status_code == 200
    picture = Image.open(BytesIO(answer.content))
    assert (picture.format, *picture.size) == ("PNG", info["image_size"], info["image_size"])


def test_the_server_is_process_1_without_any_right(container: Container) -> None:
    program = "import json; print(json.dumps(dict(line.split(':', 1) for line in open('/proc/1/status'))))"
    status = {name: text.split() for name, text in json.loads(container.python(program)).items()}
    assert status["Uid"] == status["Gid"] == ["10001"] * 4
    assert {int(status[name][0], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == ["1"]
    assert "robuq-serve" in container.python("print(open('/proc/1/cmdline').read())")


@pytest.mark.parametrize("folder", ["/opt/app", "/opt/robuq", "/etc", "/var", "/root"])
def test_nothing_can_be_written_but_tmp(container: Container, folder: str) -> None:
    assert container.run("touch", "/tmp/new").returncode == 0
    assert container.run("touch", f"{folder}/new").returncode != 0


def test_the_health_check_passes(container: Container) -> None:
    test = engine("inspect", "--format", "{{json .Config.Healthcheck.Test}}", container.name)
    form, *command = json.loads(test)
    assert form == "CMD"
    assert container.run(*command).returncode == 0


def test_another_user_may_run_it() -> None:
    """Some clusters choose the user's number themselves."""
    with started(*RESTRICTED, "--user", "54321:0") as container:
        assert container.client.post("/generate", json={"class_id": 207}).status_code == 200


def test_sigterm_finishes_what_runs_and_ends_with_0() -> None:
    with started(*RESTRICTED) as container, ThreadPoolExecutor() as pool:
        request = {"class_id": 207, "num_images": 8, "steps": 250}
        answer = pool.submit(container.client.post, "/generate", json=request)
        while container.client.get("/queue").json()["images_in_flight"] == 0:
            assert not answer.done(), answer.result().text
        began = time.monotonic()
        engine("stop", "--time", str(DRAIN_S), container.name)
        assert time.monotonic() - began < DRAIN_S  # the engine kills it at the end of that
        assert container.exit_code() == 0
        assert len(answer.result().json()["images"]) == 8
