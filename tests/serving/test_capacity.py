"""Capacity planning: the formula, what is measured, and the command."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny
from typer.testing import CliRunner

from server.capacity import measure_rows_per_s, replicas_for
from server.cli import app
from server.fake import FakeSampler

RATES = st.floats(1e-3, 1e6)
GUIDE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()


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


def test_the_measured_rate_is_that_of_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    sampler = FakeSampler(on_step=lambda rows: batches.append(len(rows)))
    monkeypatch.setattr("server.capacity.time", SimpleNamespace(perf_counter=lambda: 0.02 * len(batches)))
    rate = measure_rows_per_s(sampler, 8, steps=3, guidance_scale=1.5, seconds=2.0)
    assert set(batches) == {4}  # guided images take two rows
    assert rate == pytest.approx(8 / 0.02)


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["capacity", *options], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    write_tiny(tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


def test_the_command_plans(tiny: str) -> None:
    code, output = run("--rate", "20", "--images-per-second", "12.5", "--checkpoint", tiny, "--steps", "20")
    assert code == 0, output
    values = dict(line.split(None, 1) for line in output.splitlines())
    assert values["replicas"].startswith("4, 1 of them spare")  # ceil(20 / (0.7 * 12.5)) = 3
    assert "20 steps, guidance 1.5, 2 row(s) a step" in values["wanted"]
    assert "40% (53% with 1 lost)" in values["busy"]
    assert "memory" not in values


def test_the_command_measures(tiny: str) -> None:
    options = ["--rate", "1", "--seconds", "0.2", "--backend", "reference", "--threads", "1", "--max-batch-rows", "4"]
    code, output = run(*options, "--checkpoint", tiny)
    assert code == 0, output
    found = re.search(r"a replica +(\S+) images/s .*measured here on reference: (\S+) rows/s", output)
    assert found is not None, output
    assert re.search(r"memory +\d+ MB a replica", output)
    # 4 steps of two rows each, as the checkpoint's defaults are.
    assert float(found[1]) == pytest.approx(float(found[2]) / 8, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--images-per-second", "0"], "--images-per-second"),
        (["--images-per-second", "inf"], "--images-per-second"),
        (["--utilisation", "1"], "--utilisation"),
        (["--utilisation", "0"], "--utilisation"),
        (["--max-batch-rows", "1"], "--max-batch-rows"),
        (["--checkpoint", "no-such.safetensors"], "no-such.safetensors"),
    ],
)
def test_what_the_command_does_not_take_is_named(options: list[str], named: str) -> None:
    code, output = run("--rate", "3", "--images-per-second", "3", *options)
    assert code == 2
    assert named in output
    assert "Traceback" not in output


def test_commands_of_the_guide_run() -> None:
    commands = re.findall(r"^robuq-serve capacity ([^#\n]*)", GUIDE, re.M)
    assert len(commands) == 2
    for command in commands:
        code, output = run(*command.split(), "--seconds", "0.1", "--threads", "1", "--max-batch-rows", "2")
        assert code == 0, output
        assert "20 steps" in output
