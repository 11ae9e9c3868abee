"""The release: sdist and wheel are built from what git tracks, hold what they must, and serve when installed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from process_harness import client_of, launch, stop

import robuq_core

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build` in a copy of the tracked files: the sdist, and the wheel out of the sdist."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # The build's requirements are here already: nothing is fetched.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_the_sdist_holds_what_is_needed_to_build(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "robuq_core/kernels/native").glob("*.[ch]")}
    assert native
    assert native | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "THIRD_PARTY.md", "CHANGELOG.md"} <= names
    assert not any(name.endswith((".zip", ".jpg", ".jpeg", ".so")) for name in names)


def test_the_wheel_holds_what_is_needed_to_serve(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, pattern in (
        ("robuq_core/assets", "*.safetensors"),
        ("robuq_core/kernels/triton/tuned", "*"),
        ("server/web", "*"),
    ):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob(pattern) if p.is_file()}
        assert files
        assert files <= names
    assert "robuq_core/py.typed" in names
    assert any(re.fullmatch(r"robuq_core/kernels/_native\..*(so|pyd)", name) for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.name.startswith(f"robuq-{robuq_core.__version__}-")
    packages = {name.split("/")[0] for name in names}
    assert {p for p in packages if not p.endswith(".dist-info")} == {"robuq_core", "server", "train"}
    assert not any(name.endswith((".zip", ".jpg", ".jpeg", ".pt")) for name in names)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment of its own, with the packages that it asks for, taken from here, and no others."""
    folder = tmp_path_factory.mktemp("clean") / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for distribution in filter(None, runpy.run_path(str(ROOT / "scripts/licences.py"))["needed"]().values()):
        for path in distribution.files:
            if ".." not in path.parts:  # programs are in bin/, and not needed
                (packages / path).parent.mkdir(parents=True, exist_ok=True)
                (packages / path).symlink_to(distribution.locate_file(path))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """Variables of a shell in which nothing points to the checkout."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_what_takes_an_extra_says_so(environment: Path, tmp_path: Path, own: dict[str, str]) -> None:
    for words, extra in (
        (("robuq-train", "run", "-c", "run.yaml"), ".[train]"),
        (("robuq", "inspect", "someone/tiny"), ".[hub]"),
    ):
        command = [environment / "bin" / words[0], *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
        assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, ""), done.stderr
        assert extra in done.stderr


def test_it_serves_from_a_clean_environment(environment: Path, tmp_path: Path, own: dict[str, str]) -> None:
    assert "average activation bits" in run(environment / "bin" / "robuq", "inspect", cwd=tmp_path, env=own)
    process = launch(environment / "bin" / "robuq-serve", "--port", "0", cwd=tmp_path, env=own)
    with client_of(process) as client:
        answer = client.post("/generate", json={"class_id": 207, "seed": 0}, headers={"Accept": "image/png"})
        assert answer.status_code == 200
        assert answer.content.startswith(b"\x89PNG")
        assert client.get("/info").json()["backend"] != "reference"
        assert "RobuQ" in client.get("/").text
        stop(process)
