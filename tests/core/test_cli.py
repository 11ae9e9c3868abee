"""The console scripts: help one can work from, results on standard output, one line and exit code 2 for mistakes."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import TINY, write_tiny
from typer import Typer
from typer.testing import CliRunner

from robuq_core import cli as robuq
from robuq_core.models.presets import PRESETS
from train import cli as robuq_train

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def run(app: Typer, *arguments: str | Path, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``, or its standard error where that is not 0."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE)
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout if code == 0 else result.stderr


def error_of(app: Typer, *arguments: str | Path) -> str:
    """The one line that a mistake of the user gives."""
    errors = run(app, *arguments, code=2)
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert "Traceback" not in errors
    return errors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.safetensors"
    write_tiny(path)
    return path


def test_the_scripts_list_their_commands() -> None:
    for app, commands in (
        (robuq.app, ("sample", "inspect", "convert", "export-hub", "bench")),
        (robuq_train.app, ("teacher", "qat", "export", "evaluate")),
    ):
        page = run(app, "--help")
        assert all(command in page for command in commands)


def test_sample_writes_one_picture_a_class(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("-c", checkpoint, "--backend", "reference", "--seed", "7", "--steps", "2")
    printed = run(robuq.app, "sample", "3", "0", "3", "--out", tmp_path / "new" / "folder", *arguments)
    paths = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in paths] == ["0000_class3.png", "0001_class0.png", "0002_class3.png"]
    assert all(path.name in printed for path in paths)
    assert {Image.open(path).size for path in paths} == {(TINY.input_size, TINY.input_size)}
    # Seeds 7 and 9: the two pictures of class 3 differ; the same seed gives the same file.
    assert paths[0].read_bytes() != paths[2].read_bytes()
    run(robuq.app, "sample", "3", "--out", tmp_path / "again", *arguments)
    assert (tmp_path / "again" / "0000_class3.png").read_bytes() == paths[0].read_bytes()


def test_inspect_prints_what_the_file_holds(checkpoint: Path) -> None:
    page = run(robuq.app, "inspect", checkpoint)
    size = f"{checkpoint.stat().st_size:,} bytes"
    for expected in ("hidden_size 48", "activation_bits 2", "prediction_type sample", "2.000", "adaLN", size, "header",
                     "ternary weights (base 3)", "low-rank branch", "times smaller than FP32"):  # fmt: skip
        assert expected in page


def test_bench_prints_a_table_and_writes_json(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ("--batch", "1", "--batch", "3", "--rounds", "3", "--budget-s", "0", "--backend", "reference")
    chosen = ("--level", "forward", "--level", "op", "--layer", "mlp.fc2", "--peer", "fp32", "--peer", "int8-gemlite")
    page = run(robuq.app, "bench", "-c", checkpoint, *options, *chosen, "--threads", "1", "--out", out)
    for expected in ("mlp.fc2 192x48", "forward", "x fp32", "- int8-gemlite (op, forward): needs a CUDA GPU"):
        assert expected in page
    figures = json.loads(out.read_text())
    assert [(case["level"], case["batch"]) for case in figures["cases"]] == [
        ("op", 1),
        ("forward", 1),
        ("op", 3),
        ("forward", 3),
    ]
    assert {"cpu", "cores", "threads", "packages", "load_average"} <= set(figures["machine"])
    assert figures["settings"]["backend"] == "reference"
    assert "| op | mlp.fc2 192x48 | 1 |" in run(robuq.app, "bench", "show", out)
    plots = run(robuq.app, "bench", "plot", out, "--out", tmp_path / "plots")
    assert [Path(line).name for line in plots.splitlines()] == ["speed-op.svg", "speed-forward.svg"]


def test_a_preset_becomes_a_file_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "DiT-Tiny/4", TINY)
    out = tmp_path / "random.safetensors"
    page = run(robuq.app, "bench", "random-checkpoint", "DiT-Tiny/4", "--out", out)
    assert f"{out.stat().st_size:,} bytes" in page
    assert run(robuq.app, "inspect", out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("99",), "class_id must be 0..9, not 99"),
        (("shark",), "'shark' is not a class of this checkpoint"),
        (("1", "--backend", "cuda"), "unknown backend 'cuda': choose one of"),
        (("1", "--guidance-interval", "500", "400"), "guidance_interval must be two timesteps"),
        (("1", "-c", "absent.safetensors"), "absent.safetensors: no such file"),
    ],
)
def test_mistakes_of_sample(checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    given = ("-c", checkpoint, "--backend", "reference", "--out", tmp_path / "out", *arguments)
    assert expected in error_of(robuq.app, "sample", *given)
    assert not (tmp_path / "out").exists()
    for name, value in (("--steps", "0"), ("--seed", "-2"), ("--guidance-scale", "21"), ("--sampler", "plms")):
        assert name in run(robuq.app, "sample", "1", *given, name, value, code=2)


def test_mistakes_of_bench(checkpoint: Path) -> None:
    assert "unknown preset 'DiT-Q/3'; choose one of DiT-XL/2" in error_of(robuq.app, "bench", "--preset", "DiT-Q/3")
    assert "unknown backend" in error_of(robuq.app, "bench", "-c", checkpoint, "--backend", "gpu")
    assert "exclude each other" in error_of(robuq.app, "bench", "-c", checkpoint, "--preset", "DiT-S/8")
    assert "--quick chooses the cases itself" in error_of(robuq.app, "bench", "--quick", "--batch", "4")
    for option, message in (("--level", "unknown level 'all'"), ("--peer", "unknown peer 'all'"),
                            ("--layer", "unknown layer 'all': choose from attn.qkv")):  # fmt: skip
        assert message in error_of(robuq.app, "bench", "-c", checkpoint, option, "all")
    assert "no such file" in error_of(robuq.app, "bench", "plot", "absent.json")
