"""Commands of the guides are run as they are written; every command of ours that a page shows has known options.

A page's commands run in order, in a folder with small files of the names that the page uses. What ``--out`` names must
exist afterwards. ``localhost:8000`` becomes a server of the bundled checkpoint on a free port.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from autoencoders import LATENT, save_autoencoder_tiny, write_latent
from loaded_server import fake_server
from PIL import Image
from process_harness import SERVE, client_of, launch, stop
from tiny import write_tiny
from typer.testing import CliRunner

import robuq_core.cli
import server.cli
import train.cli
from robuq_core.export_hub import export_hub
from robuq_core.models.adapters import save_official
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
APPS = {"robuq": robuq_core.cli.app, "robuq-train": train.cli.app, "robuq-serve": server.cli.app}
BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)

# What is run: a page and how its commands begin.
RUN = {
    "README.md": ("curl localhost",),
    "docs/index.md": ("curl", "robuq sample", "robuq inspect", "robuq-serve --checkpoint"),
    "docs/training.md": ("robuq-train", "robuq sample"),
    "docs/weights.md": ("robuq convert", "robuq sample", "robuq-serve", "robuq export-hub"),
}
# Pages whose Python runs in tests of their own, with what it needs.
PYTHON_ELSEWHERE = {"docs/http-api.md"}

STAGE = {"steps": 4, "batch_size": 4, "lr": 1e-2, "save_every": 2}
TINY_RUN = {
    "run_dir": "runs/fashion-mnist",
    "precision": "fp32",
    "compile": False,
    "model": {"input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2,
              "num_classes": 4, "learn_sigma": False},
    "quant": {"rank": 2},
    "diffusion": {"prediction_type": "sample", "clip_sample": True},
    "sampler": {"steps": 3},
    "data": {"path": "photos"},
    "teacher": STAGE,
    "warmup": STAGE,
    "qat": STAGE,
    "sensitivity": {"bits": [1, 2], "samples": 4, "batch_size": 4},
    "allocate": {"average_bits": 2},
    "evaluation": {"samples": 4, "seeds": [0], "batch_size": 4},
}  # fmt: skip


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The simple commands of a page's shell blocks, as words."""
    found = []
    for block in blocks(page, "sh", "bash", "shell"):
        lexer = shlex.shlex(
            re.sub(r"\\\n|(^|[ \t]+)#.*", " ", block, flags=re.M), posix=True, punctuation_chars="\n;&|"
        )
        lexer.whitespace, lexer.whitespace_split = " \t", True
        words: list[str] = []
        for token in [*lexer, "\n"]:
            if set(token) <= set("\n;&|"):
                found += [words] if words else []
                words = []
            else:
                words.append(token)
    return found


def commands_of(program: str) -> list[tuple[str, list[str]]]:
    """Every page and command that begins with ``program``, in blocks and within sentences."""
    found = []
    for page in PAGES:
        inline = re.findall(rf"`({program} [^`\n]+)`", page.read_text())
        for words in [*commands(page), *map(shlex.split, inline)]:
            if words[:2] == [program, program]:  # an image of Docker and the program in it
                words = words[1:]
            if words[0] == program:
                found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize("program", APPS)
def test_options_that_pages_show_exist(program: str) -> None:
    def do_nothing(command: Any) -> Any:
        command.callback = lambda **_: None
        for child in getattr(command, "commands", {}).values():
            do_nothing(child)
        return command

    command = do_nothing(typer.main.get_command(APPS[program]))
    found = commands_of(program)
    assert len(found) > 3
    for page, words in found:
        # Placeholders in capitals stand for numbers as well as for files.
        words = ["1" if re.fullmatch(r"[A-Z][A-Z_]*", word) else word for word in words]
        try:
            command.main(words, prog_name=program, standalone_mode=False)
        except typer.Exit:
            pass
        except Exception as error:
            # Within a sentence an argument may be left to the reader; an option that does not exist is wrong.
            if type(error).__name__ != "MissingParameter":
                pytest.fail(f"{page}: {program} {shlex.join(words)}: {error}")


class Sandbox:
    """A folder with small files of the names that pages use, and a server of the bundled checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self._address = ""
        write_tiny(folder / "mine.safetensors")
        photos = folder / "photos"
        random = np.random.default_rng(0)
        for c in range(4):
            (photos / f"class_{c}").mkdir(parents=True)
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"class_{c}" / "0.png")
        shutil.make_archive(str(photos), "zip", photos)
        (folder / "configs").mkdir()
        shutil.copy(ROOT / "configs" / "imagenet-classes.txt", folder / "configs")
        write_latent(folder / "latent.safetensors")
        export_hub(folder / "mine.safetensors", folder / "export", licence="mit")
        network = DiT(LATENT.model_copy(update={"num_classes": 1000, "hidden_size": 64, "num_heads": 1}))
        for name in ("DiT-XL-2-256x256.pt", "DiT-S-2.pt"):
            save_official(network, folder / name)
        if find_spec("diffusers"):
            save_autoencoder_tiny(folder / "vae")
        (folder / "configs" / "fashion-mnist.yaml").write_text(yaml.safe_dump(TINY_RUN))

    @property
    def address(self) -> str:
        if not self._address:
            url, _ = self.stack.enter_context(fake_server(Sampler.from_checkpoint()))  # type: ignore[arg-type]
            self._address = url.removeprefix("http://")
        return self._address

    def run(self, program: str, *words: str) -> None:
        """Run it; fail unless it ends with 0 and has written the file or folder that it names."""
        if program == "curl":
            words = tuple(word.replace("localhost:8000", self.address) for word in words)
            subprocess.run(["curl", "-sS", "--fail", *words], cwd=self.folder, capture_output=True, check=True)
        elif program == "robuq-serve" and "keys" not in words:
            self.serve(list(words))
        else:
            result = CliRunner().invoke(APPS[program], words)
            assert result.exit_code == 0, f"{program} {shlex.join(words)}\n{result.output}\n{result.exception!r}"
        for option, value in pairwise(words):
            if option in ("-o", "--out"):
                assert (self.folder / value).exists(), f"{program} {shlex.join(words)}: no {value}"

    def serve(self, words: list[str]) -> None:
        """A server of its own starts, warms up, and drains on SIGTERM."""
        words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]
        if "--port" in words:
            words[words.index("--port") + 1] = "0"
        process = launch(sys.executable, "-c", SERVE, *words, cwd=self.folder)
        with client_of(process) as client:
            assert client.get("/health").status_code == 200
            stop(process)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.chdir(tmp_path)
    made = Sandbox(tmp_path)
    with made.stack:
        yield made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page(page: str, sandbox: Sandbox) -> None:
    if page == "docs/weights.md":
        pytest.importorskip("diffusers")
    chosen = [words for words in commands(ROOT / page) if shlex.join(words).startswith(RUN[page])]
    for beginning in RUN[page]:
        assert any(shlex.join(words).startswith(beginning) for words in chosen), beginning
    for words in chosen:
        sandbox.run(*words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        (path.name, block)
        for path in PAGES
        if path.relative_to(ROOT).as_posix() not in PYTHON_ELSEWHERE
        for block in blocks(path, "python", "py")
    ],
)
def test_python_runs(name: str, code: str, sandbox: Sandbox) -> None:
    exec(compile(code, name, "exec"), {"__name__": "example"})
