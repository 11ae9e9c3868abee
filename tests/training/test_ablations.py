import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_study import write_study

from robuq_core.config import ModelConfig
from robuq_core.models.dit import DiT
from robuq_core.models.shapes import layer_macs
from robuq_core.quant.bits import average_bits
from train.ablations.report import BEGIN, END, Findings, geometric, holm, write_report
from train.ablations.study import Cell, Result, Study, add_outliers, load_study
from train.config import ConfigError
from train.state import StateError, locked
from train.trainer import DivergedError, Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    study = Study(load_study(write_study(root)), root / "out")
    assert study.run(note=lambda _: None) == 0
    return study


def cell(study: Study, name: str, bits: float = 2, factor: float = 1, seed: int = 0) -> Cell:
    return next(c for c in study.cells() if (c.row.name, c.bits, c.factor, c.seed) == (name, bits, factor, seed))


def test_every_training_has_a_result_of_its_own(finished: Study) -> None:
    cells = list(finished.cells())
    assert len(cells) == 6 * 2 + 1
    results = {str(each): finished.result(each) for each in cells}
    assert all(found and found.teacher_mse and math.isfinite(found.teacher_mse) for found in results.values())
    seeds = [results[f"RobustQuantizer, A2, seed {seed}"] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    assert [each.row.name for each in cells[:4]] == ["baseline", "RobustQuantizer"] * 2, "contrasts come first"
    assert not list(finished.folder.glob("runs/*")), "runs of finished trainings are removed"


def test_the_search_keeps_its_budget_and_seeds_have_their_own_rotation(finished: Study) -> None:
    for bits in (2, 2.5):
        searched = cell(finished, "AMPN", bits)
        found = finished.result(searched)
        assert found is not None
        assert found.bits is not None
        assert average_bits(found.bits, layer_macs(finished.run_config(searched).model)) <= bits
    quant = [finished.run_config(cell(finished, "RobustQuantizer", seed=seed)).quant for seed in (0, 1)]
    assert [each.seed for each in quant] == [0, 1]
    assert len(list(finished.folder.glob("teacher-*/"))) == 1


def test_finished_trainings_stay_and_a_lost_one_comes_back_the_same(finished: Study) -> None:
    lost = cell(finished, "AMPN", 2.5, seed=1)
    path, before = finished.result_path(lost), finished.result(lost)
    assert before is not None
    path.unlink()
    notes: list[str] = []
    finished.run(notes.append)
    assert len(notes) == 1
    after = finished.result(lost)
    assert after is not None
    assert (after.teacher_mse, after.loss) == (before.teacher_mse, before.loss)


def test_another_process_s_training_is_left_to_it(finished: Study) -> None:
    taken = cell(finished, "baseline")
    path = finished.result_path(taken)
    path.unlink()
    with locked(path):
        assert finished.run(note=lambda _: None) == 1
        assert finished.result(taken) is None
    assert finished.run(note=lambda _: None) == 0


def test_a_training_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(load_study(write_study(tmp_path), ["seeds=[0]"]), tmp_path / "out")
    study.teacher(study.config.rows[0])
    ordinary = Trainer.run

    def diverging(trainer: Any) -> None:
        if trainer.config.quant.activation == "minmax":
            raise DivergedError("loss is nan")
        ordinary(trainer)

    monkeypatch.setattr(Trainer, "run", diverging)
    study.run(note=lambda _: None)
    found = study.result(cell(study, "baseline"))
    assert found is not None
    assert found.teacher_mse is None
    assert "diverged" in write_report(study, tmp_path).read_text()
    assert Findings(study).compared()[0].verdict == "-"


def test_the_report_keeps_what_was_written_by_hand(finished: Study, tmp_path: Path) -> None:
    page = tmp_path / "ablations.md"
    page.write_text(f"# Mine\n\nAbove.\n\n{BEGIN}\nOutdated.\n{END}\n\nBelow.\n")
    write_report(finished, tmp_path)
    text = page.read_text()
    assert text.startswith("# Mine\n\nAbove.\n")
    assert text.endswith("\nBelow.\n")
    assert "Outdated" not in text
    assert all(row.name in text for row in finished.config.rows)
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert len(found["results"]) == 13
    assert {each["verdict"] for each in found["contrasts"]} <= {"better", "worse", "not shown"}
    assert "<svg" in (tmp_path / "images/ablations.svg").read_text()
    again = page.read_text()
    write_report(finished, tmp_path)
    assert page.read_text() == again


def test_contrasts_are_paired_by_seed(finished: Study) -> None:
    findings = Findings(finished)
    findings.results = {
        (name, 2, 1): {seed: Result(value, 1.0, 1.0, None, 0.0) for seed, value in enumerate(values)}
        for name, values in (("baseline", (1.0, 4.0, 16.0)), ("RobustQuantizer", (0.5, 1.8, 8.8, 99.0)))
    }
    (found,) = findings.compared()
    logs = [math.log(ratio) for ratio in (0.5, 0.45, 0.55)]
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(math.exp(sum(logs) / 3))
    assert found.p == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    assert (found.seeds, found.corrected, found.verdict) == (3, found.p, "better")


def test_intervals_and_correction_are_the_textbook_s() -> None:
    # 1, 2, 3 have mean 2 and a half-width of 4.303 / sqrt(3).
    found = geometric([math.exp(value) for value in (1, 2, 3)])
    assert found.high == pytest.approx(math.exp(2 + 4.3027 / math.sqrt(3)), rel=1e-4)
    assert geometric([5.0]).high is None
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@torch.no_grad()
def test_outliers_leave_the_function_as_it_is(finished: Study) -> None:
    config = ModelConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=24, depth=2, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    model = DiT(config).eval()
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    inputs = torch.randn(5, 1, 8, 8), torch.arange(5) * 100, torch.arange(5) % 3
    seen: list[torch.Tensor] = []
    linears = [getattr(part, name) for block in model.blocks
               for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"))]  # fmt: skip
    for linear in linears:
        linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    before = model(*inputs)
    after = add_outliers(model, 30, 2, seed=1)(*inputs)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    for plain, outlying in zip(seen[:6], seen[6:], strict=True):
        ratio = (outlying.norm(dim=(0, 1)) / plain.norm(dim=(0, 1))).sort().values
        torch.testing.assert_close(ratio[-2:], torch.full((2,), 30.0), rtol=1e-3, atol=0)
        torch.testing.assert_close(ratio[:-2], torch.ones(22), rtol=1e-3, atol=0)


def test_results_depend_on_what_matters_alone(finished: Study, tmp_path: Path) -> None:
    root = finished.config.run.parent

    def path(*overrides: str) -> Path:
        study = Study(load_study(root / "study.yaml", list(overrides)), finished.folder)
        return study.result_path(cell(study, "AMPN", 2.5))

    before = finished.result_path(cell(finished, "AMPN", 2.5))
    assert before == path() == path("qat.save_every=1")
    changes = ("qat.steps=4", "warmup.steps=4", "teacher.steps=4", "points=41", "sensitivity.samples=9")
    assert len({before, *map(path, changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": 1}, "modle: Extra inputs"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"rows": [{"name": "a", "bits": [2.5]}]}, "whole numbers"),
        ({"rows": [{"name": "a"}]}, "needs a row 'RobustQuantizer' at 2 bits"),
        ({"set": {"quant.activation": "gauss"}}, r"quant\.activation"),
        ({"run": "none.yaml"}, r"none\.yaml"),
    ],
)
def test_mistakes_in_the_file_are_named_before_anything_trains(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(load_study(write_study(tmp_path, changes)), tmp_path / "out")


def test_a_damaged_result_is_one_line(finished: Study) -> None:
    broken = cell(finished, "full precision")
    path = finished.result_path(broken)
    content = path.read_text()
    path.write_text(content[:40])
    with pytest.raises(StateError, match="not a result of a study"):
        finished.result(broken)
    path.write_text(content)
