"""The measuring client counts what it does, checks refuse to lie, and the command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loaded_server import fake_server
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, spec
from tiny import TINY, tiny_model

from bench.serving.arrivals import Comparison, appended, figure
from bench.serving.client import PNG, Connection, closed_loop, run
from bench.serving.figures import CheckFailed, require
from bench.serving.http_costs import BODY
from bench.serving.servers import NoOpSampler, WindowPool
from loadtest.open_loop import Outcome, summarise
from loadtest.workload import check_image, gauges
from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.config import DiffusionConfig, QuantConfig, SamplerConfig
from server.fake import FakeSampler

ROOT = Path(__file__).parents[2]


def test_the_client_speaks_http() -> None:
    async def ask(url: str) -> None:
        connection = await Connection.open(url)
        for _ in range(3):  # on one connection
            answer = await connection.ask(BODY, PNG)
            assert answer.status == 200
            assert answer.header["content-type"] == "image/png"
            assert answer.seconds > float(answer.header["x-total-time"]) > 0
            check_image(answer.content, "png", 32)
        assert (await connection.ask({"class_id": -1})).status in (400, 422)
        connection.writer.close()

    with fake_server(NoOpSampler()) as (url, _):
        run(ask(url))


def test_a_closed_loop_counts_answers_and_those_it_left() -> None:
    with fake_server(FakeSampler(step_s=0.002)) as (url, engine):
        load = run(closed_loop(url, lambda: BODY, users=4, requests=100, cut_off=0.3))
        assert load.cut_off + len(load.answers) == 100
        assert 10 < load.cut_off < 60
        assert {answer.status for answer in load.answers} == {200}
        assert load.rate == len(load.answers) / load.seconds
        assert gauges(engine.metrics.render().decode())["robuq_images_total"] >= len(load.answers)


def test_a_failed_check_leaves_no_figure() -> None:
    require(True, "fine")
    with pytest.raises(CheckFailed, match="generated another image"):
        require(False, "generated another image")


@pytest.mark.parametrize(("theirs_s", "met"), [(0.2, True), (0.05, False)])
def test_a_comparison_is_met_only_when_lower_everywhere(theirs_s: float, met: bool) -> None:
    def at(latency_s: float) -> list[object]:
        return [summarise([Outcome(0, 0, latency_s, 200)] * 5, 1.0)] * 4

    comparison = Comparison(10.0, 1.0, {"continuous": at(0.1), "litserve": [*at(0.3)[:3], at(theirs_s)[0]]})  # type: ignore
    assert figure(comparison, "litserve").met is met


def test_an_unknown_measure_is_named_with_the_known() -> None:
    command = [sys.executable, "-m", "bench.serving", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "unknown measure 'speed'; choose from overhead" in done.stderr


@pytest.mark.slow
def test_the_command_measures_any_checkpoint(tmp_path: Path) -> None:
    """A flow without classes, as far as a model takes part."""
    shape, quant = TINY.model_copy(update={"num_classes": 0, "flavour": "sit"}), QuantConfig(rank=4)
    about = Description(
        quant, DiffusionConfig(prediction_type="flow"), SamplerConfig(sampler="euler", steps=3, guidance_scale=1.0)
    )
    checkpoint, out = tmp_path / "flow.safetensors", tmp_path / "f.json"
    write_checkpoint(checkpoint, tiny_model(shape, quant), about)
    measures = ["overhead", "ceiling", "efficiency", "step-tax", "occupancy", "invariance", "leak"]
    command = [sys.executable, "-m", "bench.serving", *measures, "--quick", "--checkpoint", checkpoint, "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1
    assert len(report["figures"]) == len(measures)
    assert report["figures"][1]["details"]["requests_per_s"] > 0


@pytest.mark.parametrize("window", [False, True])
def test_nothing_joins_the_batch_of_a_window(monkeypatch: pytest.MonkeyPatch, window: bool) -> None:
    if window:
        monkeypatch.setattr("serving_harness.Pool", WindowPool)
    sampler = WatchedSampler()
    with running_engine(sampler, max_batch_rows=32, max_queue_images=64) as engine:
        sampler.hold()
        first = engine.submit([spec(seed=1, steps=3)])
        assert sampler.entered.acquire(timeout=WAIT_S)
        second = engine.submit([spec(seed=2, steps=1)])
        sampler.release()
        assert [outcome(first), outcome(second)] == [None, None]
    seeds = [[seed for seed, _ in batch] for batch in sampler.batches]
    assert seeds == ([[1], [1], [1], [2]] if window else [[1], [1, 2], [1]])


def test_rounds_are_joined_end_to_end() -> None:
    first = [Outcome(0.0, 0.1, 1.0, 200), Outcome(0.5, 0.5, 3.0, 200)]
    joined = appended(first, [Outcome(0.2, 0.2, 0.4, 200)])
    assert joined[:2] == first
    assert joined[2] == Outcome(3.2, 3.2, 3.4, 200)
    assert [outcome.latency_s for outcome in joined] == pytest.approx([1.0, 2.5, 0.2])
    assert summarise(joined, 2.0).served == pytest.approx(3 / 3.4)
