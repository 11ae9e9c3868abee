"""What a run says: bars that end with their loops, lines where there is no terminal, curves for Weights & Biases."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_run import make_config, train

from robuq_core.errors import UserError
from train.logs import tracked


def divide(numbers: list[int]) -> None:
    with tracked(numbers, "dividing") as bar:
        for number in bar:
            1 / number


def test_a_loop_that_fails_leaves_no_thread_behind() -> None:
    # The error keeps the frames of its traceback, and with them a generator that nobody has closed.
    with pytest.raises(ZeroDivisionError) as caught:
        divide([1, 0])
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_TrackThread"]
    assert caught.traceback


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config(tmp_path, {"teacher": {"log_every": 3}}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher ")]
    assert [line.split()[1] for line in lines] == ["3/6", "6/6"]
    assert all({"loss", "steps_per_second", "left"} <= set(line.split()) for line in lines)


class Wandb:
    """Stands in for the package: keeps what it is given."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.open = 0

    def init(self, **settings: Any) -> Any:
        self.started.append(settings)
        self.open += 1
        return SimpleNamespace(id="abc", log=self.logged.append, finish=self.finish, define_metric=self.define_metric)

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "training_step")

    def finish(self) -> None:
        self.open -= 1


def test_curves_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(tmp_path, {"wandb": "dits"})
    train(config)
    assert [line["training_step"] for line in fake.logged] == list(range(1, 7))
    assert {"loss", "lr", "grad_norm"} <= fake.logged[0].keys()
    train(make_config(tmp_path, {"wandb": "dits", "teacher": {"steps": 8}}))
    train(config.model_copy(update={"teacher": config.teacher}), redo=True)
    assert [(each["project"], each["name"], each["id"]) for each in fake.started] == [
        ("dits", "run teacher", None), ("dits", "run teacher", "abc"), ("dits", "run teacher", None)]  # fmt: skip
    assert fake.open == 0


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb: the package is not installed"):
        train(make_config(tmp_path, {"wandb": "dits"}))


def test_a_service_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("no\nlogin")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"wandb: cannot start a run \(no login\); set WANDB_MODE=offline"):
        train(make_config(tmp_path, {"wandb": "dits"}))
