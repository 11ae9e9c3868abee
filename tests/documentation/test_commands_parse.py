"""Every command of the documentation is one that its program takes: options, arguments, targets, files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from doc_commands import ALL, ROOT, Block, Command, cut, logical_lines

from server.settings import Settings

MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")


class Wrong(Exception):
    """The command is not one that the program takes."""


def without_callbacks(command: Any) -> Any:
    """A click command that parses and does nothing."""
    command.callback = lambda **_: None
    for child in getattr(command, "commands", {}).values():
        without_callbacks(child)
    return command


def parse_click(app: typer.Typer, words: Sequence[str], *, partial: bool = False) -> None:
    """Parse as ``app`` would. ``partial``: what is required may be missing, and words in capitals stand for a value."""
    command = without_callbacks(typer.main.get_command(app))
    try:
        command.main(list(words), prog_name="x", standalone_mode=False)
    except typer.Exit:
        return
    except Exception as error:  # of the click that typer carries
        if partial and type(error).__name__ == "MissingParameter":
            return
        if partial and any(PLACEHOLDER.fullmatch(word) for word in words):
            return parse_click(app, ["1" if PLACEHOLDER.fullmatch(word) else word for word in words], partial=True)
        raise Wrong(f"{type(error).__name__}: {error}") from error


@cache
def console_script(name: str) -> typer.Typer:
    module, attribute = PROJECT["scripts"][name].split(":")
    app = getattr(importlib.import_module(module), attribute)
    assert isinstance(app, typer.Typer)
    return app


def app_of(main: Callable[..., Any]) -> typer.Typer:
    """What ``typer.run(main)`` runs."""
    app = typer.Typer()
    app.command()(main)
    return app


class Parsed(Exception):
    """The arguments were taken."""


def parse_argparse(module: ModuleType, words: Sequence[str]) -> None:
    """Run ``module.main`` up to where its arguments are parsed."""
    take = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        take(self, list(words))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            module.main()
        except Parsed:
            return
        except SystemExit as error:
            raise Wrong(f"{module.__name__} does not take {' '.join(words)}") from error
    raise AssertionError(f"{module.__name__} parses no arguments")


@cache
def script(path: str) -> ModuleType:
    sys.path.insert(0, str((ROOT / path).parent))  # as Python does for a script
    try:
        return importlib.import_module(Path(path).stem)
    finally:
        del sys.path[0]


def parse_module(name: str, words: Sequence[str], *, partial: bool) -> None:
    """``python -m name words``."""
    if name in ("train.cli", "robuq_core.cli", "server.cli"):
        return parse_click(importlib.import_module(name).app, words, partial=partial)
    if name in ("build", "pytest", "mkdocs", "cyclonedx_py", "venv"):
        return None  # not ours; see THIRD in test_commands_run.py
    if importlib.util.find_spec(f"{name}.__main__" if _is_package(name) else name) is None:
        raise Wrong(f"no module {name}")
    module = importlib.import_module(f"{name}.__main__" if _is_package(name) else name)
    if "typer" in Path(str(module.__file__)).read_text():
        return parse_click(app_of(module.main), words, partial=partial)
    return parse_argparse(module, words)


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


def parse_python(words: Sequence[str], *, partial: bool) -> None:
    if words[0] == "-m":
        return parse_module(words[1], words[2:], partial=partial)
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return None
    if not (ROOT / words[0]).is_file():
        raise Wrong(f"no file {words[0]}")
    module = script(words[0])
    if "typer" in Path(str(module.__file__)).read_text():
        return parse_click(app_of(module.main), words[1:], partial=partial)
    return parse_argparse(module, words[1:])


def parse_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    try:
        given = get_args_parser().parse_args(list(words))
    except SystemExit as error:
        raise Wrong("torchrun does not take that") from error
    if not given.module:
        raise Wrong("torchrun is shown with -m")
    parse_module(given.training_script, given.training_script_args, partial=False)


@cache
def locust_options() -> frozenset[str]:
    """The options of locust with this project's locustfile; a process of its own, as locust patches sockets."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", text))


def known_options(words: Sequence[str], known: frozenset[str]) -> None:
    for word in words:
        option = word.split("=")[0]
        if re.match(r"--?[a-zA-Z]", word) and option not in known:
            raise Wrong(f"no option {option}")


def parse_make(words: Sequence[str]) -> None:
    for word in words:
        if "=" in word:
            name = word.split("=")[0]
            if not re.search(rf"^{name} \?=", MAKEFILE, re.M):
                raise Wrong(f"Makefile has no variable {name}")
        elif not re.search(rf"^{re.escape(word)}:", MAKEFILE, re.M):
            raise Wrong(f"Makefile has no target {word}")


def parse_pip(words: Sequence[str]) -> None:
    """``pip install``: extras are ours, and constraints are files."""
    if words[0] != "install":
        raise Wrong("only pip install is shown")
    for i, word in enumerate(words[1:], 1):
        for extra in re.findall(r"\[(.*)\]", word):
            if unknown := set(extra.split(",")) - set(PROJECT["optional-dependencies"]):
                raise Wrong(f"no extra {unknown}")
        if words[i - 1] in ("-c", "--constraint", "-r") and not (ROOT / word).is_file():
            raise Wrong(f"no file {word}")


def parse_docker(words: Sequence[str]) -> None:
    """Settings are settings, build arguments are in the Dockerfile, and files exist."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] in ("-e", "--env"):
            name = word.split("=")[0]
            if name.startswith("ROBUQ_") and name.removeprefix("ROBUQ_").lower() not in Settings.model_fields:
                raise Wrong(f"no setting {name}")
        elif words[i - 1] == "--build-arg":
            if not re.search(rf"^ARG {word.split('=')[0]}=", dockerfile, re.M):
                raise Wrong(f"Dockerfile has no argument {word}")
        elif words[i - 1] in ("-f", "--file") and not (ROOT / word).is_file():
            raise Wrong(f"no file {word}")
    if "robuq-serve" in words and words[0] == "run":
        rest = words[words.index("robuq-serve") + 1 :]
        if rest[:1] == ("robuq-serve",):
            parse_click(console_script("robuq-serve"), rest[1:])


def parse_kubectl(words: Sequence[str]) -> None:
    for i, word in enumerate(words[1:], 1):
        is_file = words[i - 1] in ("-f", "-k", "--filename", "--kustomize") and not word.startswith("http")
        if is_file and not (ROOT / word).exists():
            raise Wrong(f"no file {word}")


@cache
def parse_hf(words: Sequence[str]) -> None:
    """The hub's own tool reads the command up to ``--help``; it must not look for the hub."""
    hf = Path(sys.executable).with_name("hf")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([hf, *words, "--help"], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Wrong(done.stderr)


@cache
def routes() -> tuple[re.Pattern[str], ...]:
    from server.api.app import create_app
    from server.engine.create import create_engine
    from server.engine.fake import FakeSampler

    app = create_app(create_engine([FakeSampler()], Settings()), Settings())
    paths = [*app.openapi()["paths"], "/", "/docs", "/openapi.json", "/metrics"]
    return tuple(re.compile(re.sub(r"\\\{[^/]+\\\}", "[^/]+", re.escape(path))) for path in paths)


def parse_curl(words: Sequence[str]) -> None:
    """The route exists, and the body is JSON."""
    for i, word in enumerate(words):
        if words[i - 1] in ("-d", "--data"):
            json.loads(word)
    (target,) = (w for w in words if re.match(r"(https?://)?(localhost|127\.0\.0\.1|[A-Z]+)(:\d+)?/", w))
    path = re.sub(r"^(https?://)?[^/]+", "", target).split("?")[0]
    if not any(route.fullmatch(path) for route in routes()):
        raise Wrong(f"no route {path}")


def check(command: Command) -> None:
    program, *rest = command.words
    program = program.removeprefix(".venv/bin/")
    words = tuple(rest)
    if program in PROJECT["scripts"]:
        parse_click(console_script(program), words, partial=command.inline)
    elif program in ("python", "python3"):
        parse_python(words, partial=command.inline)
    elif program == "locust":
        known_options(words, locust_options())
    else:
        parsers: dict[str, Callable[[Sequence[str]], None]] = {
            "make": parse_make,
            "pip": parse_pip,
            "docker": parse_docker,
            "kubectl": parse_kubectl,
            "curl": parse_curl,
            "hf": parse_hf,
            "torchrun": parse_torchrun,
        }
        if program in parsers:
            parsers[program](words)


@pytest.mark.parametrize("command", ALL, ids=str)
def test_it_parses(command: Command) -> None:
    check(command)


@pytest.mark.parametrize(
    "text",
    [
        "robuq sample 207 --colour red",
        "robuq paint 207",
        "robuq sample 1 --seed x",
        "robuq-serve --port many",
        "robuq-serve --prot 1",
        "robuq-train teacher",
        "python -m loadtest.open_loop --rates 1",
        "python scripts/gpu_check.py --tuna",
        "python scripts/no_such_script.py",
        "torchrun --nproc-per-node 2 -m train.cli teach -c x.yaml",
        "locust -f loadtest --no-such-option",
        "make tea",
        "pip install 'robuq[tea]'",
        ".venv/bin/pip install -c no-such-file.txt torch",
        "docker run -e ROBUQ_COLOUR=red robuq-serve",
        "docker compose -f deploy/nothing.yaml up",
        "hf uplaod OWNER/NAME export",
        "curl localhost:8000/paint",
        "curl localhost:8000/generate -d '{class_id: 1}'",
    ],
)
def test_what_is_wrong_is_found(text: str) -> None:
    (words,) = cut(text)
    with pytest.raises((Wrong, json.JSONDecodeError)):
        check(Command("page", 1, words))


def test_lines_of_shell_are_found() -> None:
    text = "$ first --a \\\n    --b  # said\nits output\n$ second | third > file && X=1 fourth 'a b'\n"
    block = Block("page", 1, "console", text)
    words = [words for _, line in logical_lines(block) for words in cut(line)]
    assert words == [("first", "--a", "--b"), ("second",), ("third",), ("X=1", "fourth", "a b")]
