"""The command line mirrors the settings: an option and a variable for each, the option wins."""

from __future__ import annotations

import inspect

import pytest

from robuq_core.errors import UserError
from server import cli
from server.settings import Settings


def test_every_setting_has_an_option_and_no_option_is_without_a_setting() -> None:
    options = set(inspect.signature(cli.main).parameters) - {"context"}
    assert options == set(Settings.model_fields)


def test_an_option_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUQ_PORT", "1234")
    assert cli.load_settings({"port": None}).port == 1234
    assert cli.load_settings({"port": 99}).port == 99


def test_a_wrong_value_names_option_and_variable() -> None:
    with pytest.raises(UserError, match=r"--target-step-s \(or ROBUQ_TARGET_STEP_S\)"):
        cli.load_settings({"target_step_s": -1.0})
