"""scripts/install-torch.sh, with a stand-in for Python that records what pip is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install-torch.sh"
# The stand-in has no torch until pip "installs" one; with a broken index the first try fails.
PYTHON = """#!/bin/sh
case "$*" in
    "-m pip"*) echo "$@" >> {log}
        case "$*" in *--index-url*) [ -e {broken} ] && exit 1 ;; esac
        touch {torch} ;;
    "-c import torch") test -e {torch} ;;
    *) echo "torch 0" ;;
esac
"""


def install(folder: Path, *, broken: bool = False, installed: bool = False, **environment: str) -> list[str]:
    log, torch, wrong, python = (folder / name for name in ("log", "torch", "broken", "python"))
    python.write_text(PYTHON.format(log=log, torch=torch, broken=wrong))
    python.chmod(0o755)
    if broken:
        wrong.touch()
    if installed:
        torch.touch()
    done = subprocess.run(
        [SCRIPT, python], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert bool(done.stderr) == broken
    assert "torch" in done.stdout
    return log.read_text().splitlines() if log.exists() else []


linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no CUDA build")


@linux
@pytest.mark.parametrize("broken", [False, True])
def test_the_cpu_build_comes_from_its_index_and_otherwise_from_the_default(tmp_path: Path, broken: bool) -> None:
    first, second = install(tmp_path, broken=broken, TORCH="cpu", TORCH_INDEX_URL="file:///an-index")
    assert "--index-url file:///an-index --no-deps torch" in first
    assert second.endswith("constraints.txt torch")
    assert "--index-url" not in second


def test_the_cuda_build_comes_from_the_default_index(tmp_path: Path) -> None:
    (line,) = install(tmp_path, TORCH="cuda")
    assert "--index-url" not in line


def test_an_installed_torch_is_kept(tmp_path: Path) -> None:
    assert install(tmp_path, installed=True) == []


def test_an_unknown_build_is_refused() -> None:
    done = subprocess.run([SCRIPT, sys.executable], env={**os.environ, "TORCH": "tpu"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TORCH" in done.stderr
    assert "tpu" in done.stderr
