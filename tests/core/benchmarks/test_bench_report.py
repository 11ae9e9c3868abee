"""The report as a file, as tables and as plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robuq_core.bench.report import (
    Absent,
    CaseTiming,
    Loading,
    MemoryUse,
    Report,
    SideTiming,
    as_markdown,
    read_report,
    summary,
    write_plots,
    write_report,
)
from robuq_core.errors import UserError


def side(name: str, median_s: float, speedup: float | None) -> SideTiming:
    return SideTiming(
        name=name, median_s=median_s, p25_s=median_s * 0.9, p75_s=median_s * 1.1, min_s=median_s * 0.8, rounds=5,
        relative_error=0.001, tolerance=0.05, speedup=speedup,
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    cases = [
        CaseTiming(
            level=level,
            case=case,
            batch=2,
            macs=2_000_000_000,
            sides=(side("fp32", 0.2, 1.0), side("robuq", 0.05, 4.0)),
            absent=(Absent(name="int8-gemlite", reason="needs a CUDA GPU"),),
        )
        for level, case in (("op", "mlp.fc2 4608x1152"), ("block", "block 0"))
    ]
    return Report(
        created="2026-01-02T03:04:05+00:00",
        machine={"cpu": "A processor", "threads": 2, "gpu": None, "load_average": 0.1, "packages": {"torch": "2.0"}},
        settings={"rounds": 5},
        cases=tuple(cases),
        memory=(
            MemoryUse(model="m", side="robuq", batch=1, idle_bytes=100 * 2**20, over_idle_bytes=50 * 2**20),
            MemoryUse(model="m", side="fp32", batch=1, idle_bytes=100 * 2**20, over_idle_bytes=400 * 2**20),
        ),
        loading=(Loading(model="m", file_bytes=1_500_000, import_s=1, load_s=0.5, ready_s=1.5, first_step_s=1.75),),
    )


def test_reports_round_trip(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "folder" / "report.json"
    write_report(path, report)
    assert read_report(path) == report
    tree = json.loads(path.read_text())
    assert tree["cases"][0]["sides"][1]["speedup"] == 4.0
    assert tree["cases"][0]["absent"] == [{"name": "int8-gemlite", "reason": "needs a CUDA GPU"}]


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "not a benchmark report: created"), ("text", "not a benchmark report")]
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_report(path)
    with pytest.raises(UserError, match="no such file; write one with `robuq bench"):
        read_report(tmp_path / "absent.json")


def test_tables_show_times_ratios_memory_and_what_is_absent(report: Report) -> None:
    text = as_markdown(report)
    assert text.startswith("A processor, 2 threads")
    assert "| op | mlp.fc2 4608x1152 | 2 | fp32 | 200 | 180..220 | 1.00 | 10 | 1.0e-03 |" in text
    assert "|  |  |  | robuq | 50 | 45..55 | 4.00 | 40 | 1.0e-03 |" in text
    assert "| m | 1 | robuq | 100 | 50 | 8.00 |" in text
    assert "| m | 1.5 | 1.00 | 0.50 | 1.50 | 1.75 |  |" in text
    assert "- int8-gemlite (op, block): needs a CUDA GPU" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("| op")}
    assert columns == {10}
    empty = as_markdown(report.model_copy(update={"cases": (), "memory": (), "loading": ()}))
    assert empty.startswith("A processor")
    assert empty.count("\n") == 1


def test_a_line_of_progress(report: Report) -> None:
    assert summary(report.cases[1]) == "block block 0 batch 2: fp32 200 ms, robuq 50 ms"
    assert summary(report.memory[0]) == "memory m batch 1 robuq: 50 MiB"
    assert summary(report.loading[0]) == "loading m: ready after 1.50 s"


def test_plots_are_one_file_a_level_and_one_of_memory(tmp_path: Path, report: Report) -> None:
    pytest.importorskip("matplotlib")
    paths = write_plots(report, tmp_path / "plots")
    assert [path.name for path in paths] == ["speed-op.svg", "speed-block.svg", "memory.svg"]
    for path in paths:
        assert path.read_text().startswith("<?xml")
