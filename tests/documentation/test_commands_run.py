"""The commands of the documentation do what they say: each is run here or by a test that is named below; or it is
checked without being run, by a test that is named, too; or it is said why none of that is done.

A page's commands run in order, in a folder that holds small files of the names that the page uses. What each of them
promises to write is there afterwards. ``localhost:8000`` is a server of the bundled checkpoint on a free port.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from doc_commands import ALL, PAGES, PYTHON, ROOT, Block, Command
from loaded_server import fake_server
from PIL import Image
from process_harness import SERVE, client_of, launch, stop
from test_commands_parse import console_script
from tiny import write_tiny
from typer.testing import CliRunner

from robuq_core.pipeline import Sampler

# What is run here, by page and the beginning of the command.
RUN = {
    "README.md": ("curl localhost",),
    "docs/quickstart.md": ("curl", "robuq sample", "robuq inspect"),
    "docs/serve-your-checkpoint.md": ("curl", "robuq sample", "robuq inspect mine", "robuq-serve"),
    "docs/train-your-own.md": ("robuq-train", "robuq sample"),
    "docs/performance.md": ("robuq compare",),
}

# What another test runs, by its program or by the function that the program calls with the words of a command line: the
# page and the command as a regular expression, and the test's file and name.
CLI, GUIDE, HERE = "tests/core/test_cli.py", "tests/serving/test_serving_guide.py", "tests/documentation"
ELSEWHERE = {
    r"docs/serving.md (robuq-serve keys|curl) .*": f"{GUIDE}::test_examples_in_the_shell_run",
    r"\S+ robuq-serve keys create \w+( --scope read)?": f"{GUIDE}::test_examples_in_the_shell_run",
    r"docs/weights.md robuq (convert|sample) .*": "tests/core/test_convert.py::test_the_examples_of_the_guide",
    r"docs/decoding.md robuq.*": "tests/core/test_decode.py::test_the_examples_of_the_guide",
    r"docs/hub.md robuq export-hub .*": "tests/core/test_hub.py::test_the_examples_of_the_guide",
    r"docs/evaluation.md robuq-train evaluate .*": "tests/training/evaluation/test_run.py::test_teacher_student",
    r"docs/evaluation.md robuq-train diagnose .*": "tests/training/diagnose/test_diagnose.py::test_the_report_is_a_page",
    r"\S+ robuq-serve( --checkpoint \S+)?( --port \d+)?": f"{HERE}/test_wheel.py::test_it_serves",
    r"\S+ robuq sample( .*)?": f"{CLI}::test_sample_writes_one_picture_a_class",
    r"\S+ robuq inspect( \S+)?": f"{CLI}::test_inspect_prints_what_the_file_holds",
    r"\S+ robuq compare( .*)?": f"{CLI}::test_compare_prints_what_short_cuts_save",
    r"\S+ robuq bench random-checkpoint .*": f"{CLI}::test_a_preset_becomes_a_file_with_random_weights",
    r"\S+ robuq bench.*": f"{CLI}::test_bench_prints_a_table_and_writes_json",
    r"\S+ robuq-train (run|evaluate)( .*)?": f"{HERE}/test_commands_run.py::test_the_commands",
    r"\S+ robuq-train (prepare|teacher|warmup|qat|export)( .*)?": "tests/training/stages/test_stages.py::trained",
    r"\S+ robuq-train diagnose( .*)?": "tests/training/diagnose/test_diagnose.py::test_the_report_is_a_page",
    r"\S+ robuq-train ablate( .*)?": "tests/training/test_train_commands.py::test_ablate_trains",
    r"\S+ robuq-train memory( .*)?": "tests/training/test_train_commands.py::test_memory_prints",
    r"\S+ robuq-serve capacity .*": "tests/serving/test_capacity.py::test_commands_of_the_guide_run",
    r"\S+ torchrun .*": "tests/training/test_train_commands.py::test_torchrun_trains",
    r"docs/cluster.md serve run .*": "tests/serving/test_ray_app.py::test_the_routes_are_those",
    r"\S+ locust .*": "tests/load/test_locustfile.py::test_a_good_server_passes",
    r"\S+ python -m loadtest.open_loop": "tests/load/test_open_loop.py::test_the_command_measures_a_server",
    r"\S+ python -m bench.training.*": "tests/benchmarks/test_bench_training.py::test_the_command_prints",
    r"\S+ python -m bench.convert.*": "tests/benchmarks/test_bench_convert.py::test_every_task_is_measured",
    r"\S+ python -m bench.serving.*": "tests/benchmarks/test_bench_serving.py::test_the_command_measures",
    r"\S+ (robuq|robuq-train|robuq-serve) --help": f"{HERE}/test_commands_checked.py::test_help_is_printed",
    r"THIRD_PARTY.md python scripts/sbom.py .*": "tests/tools/test_sbom.py::test_the_command_writes",
    r"\S+ python scripts/gpu_check.py .*": "tests/tools/test_gpu_check.py::test_rehearsal",
}

# What is parsed and not run, as that takes a cluster, a container engine or the network. What it names (files, routes,
# requirements) is checked by the test that is named, and by its own program's dry run where that is installed.
CHECKED = {
    r"docs/cluster.md kubectl apply -k \.": "tests/serving/deploy/test_kubernetes.py::test_the_guide_s_kustomization",
    r"docs/cluster.md kubectl apply -k deploy/.*": "tests/serving/deploy/test_kubernetes.py::test_kustomize_builds",
    r"docs/cluster.md serve deploy .*": "tests/serving/deploy/test_ray_deploy.py::test_serve_takes_the_file",
    r"\S+ docker compose .*": "tests/serving/deploy/test_compose.py::test_the_services",
    r"\S+ docker (build|run|stop) .*": "tests/serving/test_dockerfile.py::test_what_is_copied_exists",
    r"docs/monitoring.md curl .*/(health|ready)": "tests/serving/test_operations_api.py::test_",
    r"\S+ make .*": f"{HERE}/test_commands_checked.py::test_make_would_run",
    r"\S+ pip install '?\.(\[.*)?": f"{HERE}/test_commands_checked.py::test_pip_would_install",
}

# What no test runs, and why. Each still has to parse.
STATED = {
    r"docs/cluster.md (docker push|kubectl get) .*": "talks to a registry, or to a cluster",
    r"docs/containers.md pytest .*": "needs a container engine and an image that was built",
    r"docs/hub.md hf (upload|auth) .*": "talks to the hub",
    r"\S+ tensorboard .*": "somebody else's program, which does not end",
    r"docs/quickstart.md \.venv/bin/pip install .*": "installs torch from the network",
    r"\S+ python3 -m venv \.venv": "the environment that the tests run in was made so",
    r"\S+ python scripts/triton_report.py": "compiles every kernel for six architectures, which takes minutes",
}
ACCOUNTS = {**ELSEWHERE, **CHECKED, **STATED}

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
    "data": {"path": "photos", "resize": 10},
    "teacher": STAGE,
    "warmup": STAGE,
    "qat": STAGE,
    "sensitivity": {"bits": [1, 2], "samples": 4, "batch_size": 4},
    "allocate": {"average_bits": 2},
    "evaluation": {"samples": 4, "seeds": [0], "batch_size": 4},
}  # fmt: skip


def runs_here(command: Command) -> bool:
    beginnings = RUN.get(command.page, ())
    return not command.inline and command.text.startswith(tuple(beginnings))


def rule(command: Command) -> str | None:
    return next((key for key in ACCOUNTS if re.fullmatch(key, f"{command.page} {command.text}", re.S)), None)


@pytest.mark.parametrize("command", [c for c in ALL if not runs_here(c)], ids=str)
def test_what_is_not_run_here_is_accounted_for(command: Command) -> None:
    assert rule(command) is not None, (
        f"run it in RUN, or name in ELSEWHERE, CHECKED or STATED what runs or checks it, or why not: {command}"
    )


@pytest.mark.parametrize("key", ACCOUNTS)
def test_no_account_is_stale(key: str) -> None:
    assert any(rule(command) == key for command in ALL if not runs_here(command))
    if key not in STATED:
        path, _, name = ACCOUNTS[key].partition("::")
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}" in (ROOT / path).read_text(), name


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
        (folder / "configs" / "fashion-mnist.yaml").write_text(yaml.safe_dump(TINY_RUN))

    @property
    def address(self) -> str:
        if not self._address:
            url, _ = self.stack.enter_context(fake_server(Sampler.from_checkpoint()))  # type: ignore[arg-type]
            self._address = url.removeprefix("http://")
        return self._address

    def run(self, command: Command) -> None:
        """Run it; fail unless it ends with 0 and has written the file or folder that it names."""
        program, *words = command.words
        if program == "curl":
            words = [word.replace("localhost:8000", self.address) for word in words]
            subprocess.run(["curl", "-sS", "--fail", *words], cwd=self.folder, capture_output=True, check=True)
        elif program == "robuq-serve" and "keys" not in words:
            self.serve(words)
        else:
            result = CliRunner().invoke(console_script(program), words)
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        for option, value in pairwise(words):
            if option in ("-o", "--out"):
                assert (self.folder / value).exists(), f"{command}: no {value}"

    def serve(self, words: list[str]) -> None:
        """A server of its own starts, warms up, and drains when told to."""
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


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page(page: str, sandbox: Sandbox) -> None:
    chosen = [command for command in ALL if command.page == page and runs_here(command)]
    assert chosen
    for beginning in RUN[page]:
        assert any(command.text.startswith(beginning) for command in chosen), beginning
    for command in chosen:
        sandbox.run(command)


# Pages whose Python is run by a test of their own.
PYTHON_ELSEWHERE = {
    "docs/serving.md": "tests/serving/test_serving_guide.py::test_examples_in_python_run",
    "docs/decoding.md": "tests/core/test_decode.py::test_the_examples_of_the_guide",
    "docs/hub.md": "tests/core/test_hub.py::test_the_examples_of_the_guide",
}


@pytest.mark.parametrize("block", [b for b in PYTHON if b.page not in PYTHON_ELSEWHERE], ids=str)
def test_python_runs(block: Block, sandbox: Sandbox) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "example"})


def test_python_elsewhere_is_there() -> None:
    for page, where in PYTHON_ELSEWHERE.items():
        assert any(block.page == page for block in PYTHON)
        path, _, name = where.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_pages_are_found() -> None:
    assert len(PAGES) > 15
    assert len(ALL) > 60
