"""Capacity planning: the formula, the estimate of memory against what a model really takes, and the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY, write_tiny
from typer.testing import CliRunner

from robuq_core.checkpoint import Header, read_header
from robuq_core.config import QuantConfig
from robuq_core.errors import UserError
from robuq_core.models.presets import PRESETS
from robuq_core.pipeline import Sampler, bundled_checkpoint
from server.capacity import TARGET_UTILISATION, measure_rows_per_s, plan_replicas, replica_memory, rows_per_image
from server.cli import app
from server.fake import FakeSampler

RATES = st.floats(1e-3, 1e6)


@given(RATES, RATES, st.floats(0.05, 0.95), st.integers(0, 5))
def test_enough_replicas_and_not_one_too_many(rate: float, each: float, utilisation: float, spare: int) -> None:
    plan = plan_replicas(rate, each, utilisation=utilisation, spare=spare)
    needed = plan.replicas - spare
    assert needed >= 1
    assert plan.busy_without_spare <= utilisation * (1 + 1e-6)
    assert plan.busy <= plan.busy_without_spare
    if needed > 1:
        assert rate / ((needed - 1) * each) > utilisation
    assert plan.slowdown == pytest.approx(1 / (1 - plan.busy))


def test_a_rate_that_fits_exactly_needs_no_more() -> None:
    assert plan_replicas(0.7 * 3 * 0.1, 0.1, utilisation=0.7).replicas == 3
    assert plan_replicas(7.0, 1.0).replicas == 10
    assert plan_replicas(7.1, 1.0, spare=2).replicas == 13
    assert plan_replicas(TARGET_UTILISATION, 1.0).slowdown == pytest.approx(10 / 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rate": 0.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"per_replica": -1.0}, "--images-per-second"),
        ({"per_replica": float("inf")}, "--images-per-second"),
        ({"utilisation": 1.0}, "--utilisation"),
        ({"utilisation": 0.0}, "--utilisation"),
        ({"spare": -1}, "--spare"),
    ],
)
def test_a_number_out_of_range_is_named(change: dict[str, float], named: str) -> None:
    arguments = {"rate": 1.0, "per_replica": 1.0, "utilisation": 0.5, "spare": 0, **change}
    with pytest.raises(UserError, match=named):
        plan_replicas(arguments.pop("rate"), arguments.pop("per_replica"), **arguments)  # type: ignore[arg-type]


def test_guidance_takes_two_rows() -> None:
    assert (rows_per_image(1.0), rows_per_image(1.5)) == (1, 2)


@pytest.mark.parametrize(
    "quant", [QuantConfig(rank=4), QuantConfig(rank=0), QuantConfig(rank=4, adaln_rank=2)], ids=["4", "0", "adaln"]
)
def test_the_weights_in_memory_are_told_by_the_header(tmp_path: Path, quant: QuantConfig) -> None:
    write_tiny(tmp_path / "tiny.safetensors", quant=quant)
    sampler = Sampler.from_checkpoint(tmp_path / "tiny.safetensors", backend="reference")
    assert replica_memory(read_header(tmp_path / "tiny.safetensors"), 32, 0).weights == sampler.weight_bytes


# How far a forward raises the peak of a process whose spare memory has been given back to the system.
FORWARD = """
import ctypes, re, sys, torch
from pathlib import Path
from robuq_core.models.presets import PRESETS
from robuq_core.pipeline import Sampler, bundled_checkpoint
torch.set_num_threads(1)
model = Sampler.from_checkpoint(sys.argv[1], backend="cpu", threads=1).model
def forward(rows):
    shape = (rows, model.config.in_channels, model.config.input_size, model.config.input_size)
    classes = torch.zeros(rows, dtype=torch.long)
    with torch.inference_mode():
        model.forward(torch.zeros(shape), classes, classes)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
forward(1)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
forward(int(sys.argv[2]))
print(peak() - before)
"""
WIDE = TINY.model_copy(update={"input_size": 64, "hidden_size": 96, "depth": 1})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_activations_are_what_a_forward_takes(tmp_path: Path) -> None:
    path, rows = tmp_path / "wide.safetensors", 128
    write_tiny(path, WIDE)
    command = [sys.executable, "-c", FORWARD, str(path), str(rows)]
    took = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    activations = replica_memory(read_header(path), rows, 0).activations
    assert activations > 40e6, "too little to be told from noise"
    assert took == pytest.approx(activations, rel=0.5)


def test_the_measured_rate_is_that_of_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    sampler = FakeSampler(on_step=lambda rows: batches.append(len(rows)))
    monkeypatch.setattr("server.capacity.time", SimpleNamespace(perf_counter=lambda: 0.02 * len(batches)))
    rate = measure_rows_per_s(sampler, 8, steps=3, guidance_scale=1.5, seconds=2.0)
    assert set(batches) == {4}  # guided images take two rows
    assert rate == pytest.approx(8 / 0.02)


def test_what_the_model_raises_is_raised() -> None:
    def fail(_: object) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        measure_rows_per_s(FakeSampler(on_step=fail), 8, steps=3, guidance_scale=1.5, seconds=0.1)


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["capacity", *options], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_plans(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    code, output = run("--rate", "20", "--images-per-second", "12.5", "--checkpoint", str(path), "--steps", "20")
    assert code == 0, output
    values = dict(line.split(None, 1) for line in output.splitlines())
    assert values["replicas"].startswith("4, 1 of them spare")  # ceil(20 / (0.7 * 12.5)) = 3
    assert "20 steps, guidance 1.5 (2 row(s) a step)" in values["wanted"]
    assert "40% (53% with 1 lost)" in values["busy"]
    assert re.search(r"\d [MG]B a replica", values["memory"])


def test_the_command_measures(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    options = ["--rate", "1", "--measure", "--seconds", "0.2", "--backend", "reference", "--threads", "1"]
    code, output = run(*options, "--checkpoint", str(path), "--max-batch-rows", "4")
    assert code == 0, output
    found = re.search(r"a replica +(\S+) images/s .*measured here on reference: (\S+) rows/s", output)
    assert found is not None, output
    # 4 steps of two rows each, as the checkpoint's defaults are.
    assert float(found[1]) == pytest.approx(float(found[2]) / 8, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--measure"),
        (["--measure", "--images-per-second", "3"], "--images-per-second"),
        (["--images-per-second", "3", "--threads", "2"], "--threads"),
        (["--images-per-second", "0"], "--images-per-second"),
        (["--images-per-second", "3", "--utilisation", "1.5"], "--utilisation"),
        (["--images-per-second", "3", "--max-batch-rows", "1"], "--max-batch-rows"),
        (["--images-per-second", "3", "--checkpoint", "no-such.safetensors"], "no-such.safetensors"),
    ],
)
def test_what_the_command_does_not_take_is_named(options: list[str], named: str) -> None:
    code, output = run("--rate", "3", *options)
    assert code == 2
    assert named in output
    assert "Traceback" not in output


GUIDE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()


def memory_table() -> str:
    """What the guide says of the parts of memory that a header tells, for 32 rows."""
    xl = Header.model_construct(model=PRESETS["DiT-XL/2"], quant=QuantConfig())
    rows = ["| | weights | activations | modulations |", "|---|---|---|---|"]
    for name, header in (("bundled checkpoint", read_header(bundled_checkpoint())), ("DiT-XL/2, rank 16", xl)):
        memory = replica_memory(header, 32, 0)
        parts = (memory.weights, memory.activations, memory.conditioning)
        rows.append(f"| {name} | " + " | ".join(f"{part / 1e6:.1f} MB" for part in parts) + " |")
    return "\n".join(rows) + "\n"


def test_the_guide_tells_what_the_command_would() -> None:
    told = re.search(r"<!-- memory -->\n(.*?)<!-- end -->", GUIDE, re.S)
    assert told is not None
    assert told[1] == memory_table()


def test_commands_of_the_guide_run() -> None:
    commands = re.findall(r"^robuq-serve capacity ([^#\n]*)", GUIDE, re.M)
    assert len(commands) == 2
    for command in commands:
        options = command.split()
        if "--measure" in options:
            options += ["--seconds", "0.1", "--threads", "1", "--max-batch-rows", "2"]
        code, output = run(*options)
        assert code == 0, output
        assert "20 steps" in output
