"""The examples run as their README shows them, with tiny models and few steps; the notebook runs in a kernel."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import LATENT, save_autoencoder_tiny
from PIL import Image
from tiny import TINY

from robuq_core import RowSpec, Sampler
from robuq_core.models.adapters import save_diffusers, save_official
from robuq_core.models.dit import DiT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """In this process; returns its names."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_apart(folder: Path, name: str, *arguments: str) -> str:
    """In a process of its own, as it runs our commands; returns what it prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plain_dit(model: object) -> DiT:
    torch.manual_seed(0)
    dit = DiT(model)  # type: ignore[arg-type]
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def test_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("generate.py", "goldfish", "207", "--steps", "2", "--out", str(tmp_path), monkeypatch=monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_goldfish.png", "1_207.png"]
    expected = Sampler.from_checkpoint().generate([1], seed=0, steps=2)[0]
    assert np.array_equal(Image.open(tmp_path / "0_goldfish.png"), expected)


def test_add_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise it is DDIM, as the sampler of the package computes it; with noise it is not."""
    options = ("--steps", "4", "--out", str(tmp_path / "x.png"))
    names = run("add_sampler.py", *options, "--eta", "0", monkeypatch=monkeypatch)
    sampler = Sampler.from_checkpoint()
    row = sampler.start(RowSpec(class_id=207, seed=0, steps=4, guidance_scale=1.0, sampler="ddim"))
    sampler.finish([row])
    assert torch.allclose(names["ours"], row.x, atol=1e-5)  # type: ignore[arg-type]
    noisy = run("add_sampler.py", *options, "--eta", "1", monkeypatch=monkeypatch)
    assert not torch.equal(noisy["ours"], noisy["plain"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_train_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    run_apart(tmp_path, "train_folder.py", "photos", "--run", "run", "--steps", "2")
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2
    assert Sampler.from_checkpoint(tmp_path / "run" / "model.safetensors").class_names == ("cat", "dog")


@pytest.mark.slow
def test_quantise_dit(tmp_path: Path) -> None:
    """Calibration comes nearer than rounding, by the errors that the script prints."""
    save_official(
        plain_dit(TINY.model_copy(update={"num_classes": 1000, "hidden_size": 64, "num_heads": 1})),
        tmp_path / "DiT-tiny.pt",
    )
    options = ("--bits", "4", "--steps", "0", "--inputs", "8")
    printed = run_apart(tmp_path, "quantise_dit.py", "DiT-tiny.pt", *options)
    for name in ("rounded", "calibrated"):
        assert re.search(rf"^{name}\.safetensors: .* MB, \{{'relative_error", printed, re.M)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
def test_serve_diffusers(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    save_diffusers(plain_dit(LATENT.model_copy(update={"num_classes": 1000})), folder)
    save_autoencoder_tiny(folder / "vae")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    run_apart(tmp_path, "serve_diffusers.py", "pipeline", "--port", port, "--steps", "2", "--once")
    assert Image.open(tmp_path / "first.png").size == (16, 16)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nbclient") is None or find_spec("ipykernel") is None, reason="needs nbclient, ipykernel")
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLES / "first_hour.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_readme_names_every_example() -> None:
    named = set(re.findall(r"examples/(\w+\.py)|\((\w+\.ipynb)\)", (EXAMPLES / "README.md").read_text()))
    assert {a or b for a, b in named} == {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".ipynb")}
    assert all("outputs" not in cell or not cell["outputs"]
               for cell in json.loads((EXAMPLES / "first_hour.ipynb").read_text())["cells"])  # fmt: skip
