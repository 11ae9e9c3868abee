"""The command line: an option and a variable for each setting, the commands of keys, the calculator of capacity."""

from __future__ import annotations

import inspect
import logging
import re
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from robuq_core.errors import UserError
from server import cli
from server.capacity import replicas_for
from server.keys import create_key, read_keys
from server.settings import Settings, load_settings


def test_every_setting_has_an_option_and_no_option_is_without_a_setting() -> None:
    options = set(inspect.signature(cli.main).parameters) - {"context"}
    assert options == set(Settings.model_fields)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output)
    for option, kind in (("checkpoint-dir", "path"), ("threads", "int"), ("cors-origins", "list[str]")):
        assert re.search(rf"--{option} +<{re.escape(kind)}>", shown), option


def test_origins_come_from_options_and_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("https://example.org", "http://localhost:3000")
    assert load_settings({"cors_origins": list(wanted)}).cors_origins == wanted
    monkeypatch.setenv("ROBUQ_CORS_ORIGINS", " ".join(wanted))
    assert load_settings({}).cors_origins == wanted
    assert load_settings({"cors_origins": ["https://a.org"]}).cors_origins == ("https://a.org",)  # the option wins
    for wrong in ("example.org", "https://example.org/", "https://example.org/page", "null", ""):
        with pytest.raises(UserError, match=r"--cors-origins .* is not an origin"):
            load_settings({"cors_origins": [wrong]})


def test_hosts_and_proxies_come_from_options_and_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUQ_ALLOWED_HOSTS", "example.org *.example.org ::1")
    monkeypatch.setenv("ROBUQ_TRUSTED_PROXIES", "10.0.0.0/8 fd00::1")
    settings = Settings()
    assert settings.allowed_hosts == ("example.org", "*.example.org", "::1")
    for header, accepted in (("example.org:80", True), ("a.example.org", True), ("[::1]:8000", True), ("b.org", False)):
        assert settings.accepts_host(header) == accepted, header
    for address, trusted in (("10.9.8.7", True), ("fd00::1", True), ("11.0.0.1", False), ("", False)):
        assert settings.trusts(address) == trusted, address
    for wrong in ("https://example.org", "example.org:80", "Example.org", "a b", "", "[::1]"):
        with pytest.raises(UserError, match="--allowed-hosts"):
            load_settings({"allowed_hosts": [wrong]})
    for wrong in ("proxy", "10.0.0.0/99", ""):
        with pytest.raises(UserError, match="--trusted-proxies"):
            load_settings({"trusted_proxies": [wrong]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("request_timeout_s", "inf"), ("stall_timeout_s", "nan"), ("port", "70000"), ("log_level", "loud")],
)
def test_a_value_that_no_option_takes_is_named_with_its_option(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} \(or ROBUQ_{name.upper()}\): .*{value}"):
        load_settings({name: value})


@pytest.mark.parametrize(
    ("host", "with_keys", "warned"),
    [("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False), ("localhost", False, False)],
)
def test_an_open_server_on_every_interface_warns_once(
    host: str,
    with_keys: bool,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def nothing_to_load(*_: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("server.logs.configure_logging", lambda *_: None)
    monkeypatch.setattr("server.launch.prepare", nothing_to_load)
    create_key(tmp_path / "keys.json", "alice")
    options = ["--host", host, "--port", "0"] + ["--api-keys-file", str(tmp_path / "keys.json")] * with_keys
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(cli.app, options)
    assert "far enough" in result.stderr
    assert [host in record.getMessage() for record in caplog.records if record.name == "server.cli"] == [True] * warned


def test_a_missing_file_of_keys_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("server.logs.configure_logging", lambda *_: None)
    result = CliRunner().invoke(cli.app, ["--api-keys-file", str(tmp_path / "none.json")])
    assert result.exit_code == 2
    assert "robuq-serve keys create" in result.stderr


def test_the_commands_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    runner, variables = CliRunner(), {"ROBUQ_API_KEYS_FILE": str(path)}

    def run(*words: str) -> tuple[int, str, str]:
        result = runner.invoke(cli.app, ["keys", *words], env=variables)
        return result.exit_code, result.stdout, result.stderr

    code, key, hint = run("create", "alice", "--scope", "admin", "--scope", "admin", "--images-per-minute", "5")
    assert (code, key.strip() in hint) == (0, False)
    assert key.strip() not in path.read_text()
    (alice,) = read_keys(path)
    assert (alice.scopes, alice.images_per_minute, alice.requests_per_minute) == (("admin",), 5, None)
    for words, told in (
        (("create", "alice"), "alice"),
        (("create", "a b"), "name"),
        (("create", "bob", "--scope", "root"), "'read', 'generate' or 'admin'"),
        (("revoke", "bob"), "bob"),
    ):
        code, _, errors = run(*words)
        assert (code, len(errors.splitlines()), errors.startswith("error: ")) == (2, 1, True)
        assert told in errors
    assert run("create", "bob", "--images-per-minute", "0")[0] == 2
    code, table, _ = run("list")
    assert code == 0
    assert "alice" in table
    assert alice.sha256 not in table
    assert run("revoke", "alice")[0] == 0
    assert read_keys(path) == ()


RATES = st.floats(1e-3, 1e6)


@given(RATES, RATES, st.floats(0.05, 0.95))
def test_enough_replicas_and_not_one_too_many(rate: float, each: float, utilisation: float) -> None:
    needed = replicas_for(rate, each, utilisation)
    assert needed >= 1
    assert rate / (needed * each) <= utilisation * (1 + 1e-6)
    if needed > 1:
        assert rate / ((needed - 1) * each) > utilisation


def test_a_rate_that_fits_exactly_needs_no_more() -> None:
    assert replicas_for(0.7 * 3 * 0.1, 0.1, 0.7) == 3
    assert (replicas_for(7.0, 1.0), replicas_for(7.1, 1.0)) == (10, 11)


def planned(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["capacity", *options], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_plans() -> None:
    code, output = planned("--rate", "20", "--images-per-second", "12.5")
    assert code == 0, output
    assert "4, 1 of them spare" in output  # ceil(20 / (0.7 * 12.5)) = 3
    assert "40% (53% with 1 lost)" in output
    guide = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    (command,) = re.findall(r"^robuq-serve capacity ([^#\n]*)", guide, re.M)
    assert planned(*command.split())[0] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--rate", "0"), ("--rate", "nan"), ("--images-per-second", "0"), ("--images-per-second", "inf")),
        *(("--utilisation", "1"), ("--utilisation", "0")),
    ],
)
def test_what_the_command_does_not_take_is_named(option: str, value: str) -> None:
    code, output = planned("--rate", "3", "--images-per-second", "3", option, value)
    assert code == 2
    assert option in output
    assert "Traceback" not in output
