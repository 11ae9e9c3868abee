import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from bench.training import PLAIN, QAT, check_layers, measure, sides
from robuq_core.bench.timing import BenchError, Timer
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3, learn_sigma=False
)


def test_every_side_is_timed_against_plain_training_and_learns() -> None:
    ticks = iter(range(10**6))
    # A clock that moves one second a look: every turn takes as long, so every side is as fast as plain training.
    timer = Timer(rounds=2, budget_s=math.inf, clock=lambda: float(next(ticks)))
    results, error = measure(TINY, 4, timer, steps=3, compiled=False)
    assert [each.name for each in results] == list(sides())
    assert {each.name: each.speed for each in results}[QAT] == 1
    assert all(each.steps_per_second == pytest.approx(3) for each in results)
    assert all(each.loss_after < each.loss_before for each in results)
    assert error <= 1e-5
    assert results[0].name == PLAIN


def test_a_forward_that_is_not_the_packed_one_is_no_figure() -> None:
    model = DiT(TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = quantize_model(model, QuantConfig(rank=2))
    assert check_layers(model) <= 1e-5
    layer = model.get_submodule("blocks.0.mlp.fc1")
    layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(BenchError, match=r"blocks\.0\.mlp\.fc1"):
        check_layers(model)


def test_the_command_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    options = ["--eager", "--batch", "2", "--rounds", "1", "--steps", "2", "--out", tmp_path / "training.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "bench.training", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert (report["batch"], report["compiled"], report["layer_error"] <= 1e-4) == (2, False, True)
    assert [side["name"] for side in report["sides"]] == list(sides())
    assert all(side["name"] in done.stdout for side in report["sides"])
    assert f"{QAT}: {report['sides'][1]['speed']:.2f} of plain training" in done.stdout
