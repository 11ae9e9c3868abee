"""Each conversion is timed in a process of its own, and no figure comes without its check."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import convert
from bench.convert import check_same, main, measure
from robuq_core.bench.timing import BenchError
from robuq_core.config import ModelConfig

TINY = ModelConfig(input_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
TASKS = ["write official", "official to diffusers", "diffusers to official", "pack, planes 1", "sample, planes 1",
         "pack, planes 3", "sample, planes 3"]  # fmt: skip


@pytest.mark.slow
def test_every_task_is_measured_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # where bench is found
    monkeypatch.setattr(convert, "preset", {"tiny": TINY}.__getitem__)
    app, out = typer.Typer(), tmp_path / "report.json"
    app.command()(main)
    result = CliRunner().invoke(app, ["--preset", "tiny", "--steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert (report["preset"], report["steps"], report["model"]["hidden_size"]) == ("tiny", 2, 32)
    assert report["machine"]["packages"]["torch"] == torch.__version__
    tasks = {task["name"]: task for task in report["tasks"]}
    assert list(tasks) == TASKS
    for task in tasks.values():
        assert task["seconds"] > 0
        assert task["peak_bytes"] > task["private_peak_bytes"] > 50 * 2**20  # torch alone
    assert tasks["pack, planes 1"]["relative_error"] > tasks["pack, planes 3"]["relative_error"] > 0
    assert tasks["pack, planes 1"]["file_bytes"] < tasks["pack, planes 3"]["file_bytes"]
    assert tasks["write official"]["file_bytes"] > TINY.hidden_size**2
    assert tasks["sample, planes 3"]["backend"]


def _fake_child(official: dict[str, Any], back: dict[str, Any], errors: dict[int, float]) -> Any:
    """Stands in for the processes: writes what the checks look at."""

    def run_child(task: str, arguments: dict[str, Any], _: str) -> dict[str, Any]:
        if task in ("write", "convert"):
            torch.save(official if task == "write" else back, arguments["target"])
        elif task == "pack":
            Path(arguments["target"]).write_bytes(b"")
        error = {"relative_error": errors[arguments["planes"]]} if task == "pack" else {}
        return {"peak_bytes": 2, "private_peak_bytes": None, **error}

    return run_child


@pytest.mark.parametrize(
    ("back", "errors", "message"),
    [
        ({"a": torch.ones(2)}, {1: 0.1, 3: 0.02}, None),
        ({"a": torch.ones(2) * 1.5}, {1: 0.1, 3: 0.02}, r"a of back\.pt is not that of official\.pt"),
        ({"a": torch.ones(2).double()}, {1: 0.1, 3: 0.02}, r"a of back\.pt is not that"),
        ({"b": torch.ones(2)}, {1: 0.1, 3: 0.02}, r"tensors of official\.pt and back\.pt are not the same"),
        ({"a": torch.ones(2)}, {1: 0.02, 3: 0.1}, "more planes must come closer"),
        ({"a": torch.ones(2)}, {1: 0.1, 3: float("nan")}, "more planes must come closer"),
    ],
)
def test_what_fails_its_check_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: dict[str, Any], errors: dict[int, float], message: str | None
) -> None:
    monkeypatch.setattr(convert, "run_child", _fake_child({"a": torch.ones(2)}, back, errors))
    if message is None:
        assert [each.name for each in measure(TINY, tmp_path, 2, 1.5)] == TASKS
        check_same(tmp_path / "official.pt", tmp_path / "back.pt")
        return
    with pytest.raises(BenchError, match=message):
        list(measure(TINY, tmp_path, 2, 1.5))


def test_an_unknown_preset_is_named() -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--preset", "DiT-XS/2"])
    assert result.exit_code == 2
    assert "--preset: unknown preset 'DiT-XS/2'" in result.stderr
