import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import CLASSES, write_study
from torch import nn

from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.models.dit import DiT
from train.ablations import runs
from train.ablations.config import load_study
from train.ablations.findings import cells, directions
from train.ablations.intervals import mean_interval, ratio_interval
from train.ablations.report import BEGIN, END, write_report
from train.ablations.runs import read_result, result_path, with_widths
from train.ablations.study import Study, run_study
from train.ablations.training import DivergedError, draw_samples, train_model
from train.config import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    return run_study(load_study(write_study(root)), root / "out", workers=1)


def test_every_row_has_a_finite_result_for_every_seed(finished: Study) -> None:
    for row in finished.config.rows:
        for width in finished.config.row_widths(row):
            results = finished.results(row, width)
            assert len(results) == 2
            assert all(each.distance is not None and math.isfinite(each.distance) for each in results)
    assert len(finished.results(None, 0)) == 2
    assert len(list(cells(finished, finished.config.ladder))) == 6


def test_widths_of_the_searched_row_keep_its_budget(finished: Study) -> None:
    ampn = finished.config.ladder[2]
    found = finished.allocation(ampn, 2)
    assert found is not None
    best = found.allocations["dynamic_programming"]
    assert best.average_bits <= 2
    assert all(best.predicted_loss <= each.predicted_loss + 1e-12 for each in found.allocations.values())
    spec = finished.row_spec(ampn, 2, 0)
    assert spec is not None
    assert spec.quant is not None
    assert {n: spec.quant.bits.get(n, 2) for n in best.bits} == best.bits


def test_a_search_that_finds_one_width_shares_the_runs_of_the_row_above() -> None:
    quant = QuantConfig(activation_bits=3, rank=2)
    assert with_widths(quant, {"blocks.0.mlp.fc1": 3, "blocks.0.mlp.fc2": 3}) == quant
    assert with_widths(quant, {"blocks.0.mlp.fc1": 3, "blocks.0.mlp.fc2": 2}).bits == {"blocks.0.mlp.fc2": 2}


def test_what_is_done_is_left_alone_and_what_is_lost_comes_back_the_same(
    finished: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = finished.row_spec(finished.config.ladder[0], 2, 1)
    assert spec is not None
    before = read_result(finished.place, spec)
    result_path(finished.place, spec).unlink()
    trained = []

    def counted(model: DiT, *args: Any, **kwargs: Any) -> float:
        trained.append(kwargs["seed"])
        return train_model(model, *args, **kwargs)

    monkeypatch.setattr(runs, "train_model", counted)
    run_study(finished.config, finished.place.folder, workers=1)
    assert trained == [2]
    after = read_result(finished.place, spec)
    assert before is not None
    assert after is not None
    assert (after.distance, after.agreement, after.loss) == (before.distance, before.agreement, before.loss)


def test_the_report_keeps_what_was_written_by_hand(finished: Study, tmp_path: Path) -> None:
    page = tmp_path / "ablations.md"
    page.write_text(f"# Mine\n\nAbove.\n\n{BEGIN}\nOutdated.\n{END}\n\nBelow.\n")
    write_report(finished, tmp_path)
    text = page.read_text()
    assert text.startswith("# Mine\n\nAbove.\n")
    assert text.endswith("\nBelow.\n")
    assert "Outdated" not in text
    for name in ("baseline", "RobustQuantizer", "AMPN", "no rotation", "dynamic programming", "FD-FashionNet"):
        assert name in text
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert {each["verdict"] for each in found["directions"]} <= {"better", "worse", "not told apart"}
    assert 0 <= found["feature_network_accuracy"] <= 1
    for picture in ("ablations.svg", "ablations-samples.png"):
        assert (tmp_path / "images" / picture).stat().st_size > 1000
    again = page.read_text(), (tmp_path / "images/ablations.svg").read_bytes()
    write_report(finished, tmp_path)
    assert (page.read_text(), (tmp_path / "images/ablations.svg").read_bytes()) == again


def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_study(write_study(tmp_path, {"seeds": [0], "widths": [2], "extras": []}))

    def diverging(model: DiT, *args: Any, **kwargs: Any) -> float:
        if kwargs["seed"] == 1:
            raise DivergedError("loss nan")
        return train_model(model, *args, **kwargs)

    monkeypatch.setattr(runs, "train_model", diverging)
    study = Study(config, tmp_path / "out")
    spec = study.row_spec(config.ladder[0], 2, 0)
    assert spec is not None
    assert runs.run(study.place, spec).distance is None
    assert read_result(study.place, spec) == runs.run(study.place, spec)


@pytest.mark.slow
def test_processes_give_what_one_process_gives(finished: Study, tmp_path: Path) -> None:
    config = finished.config.model_copy(update={"ladder": finished.config.ladder[:1], "extras": (), "widths": (2,)})
    study = run_study(config, tmp_path / "out", workers=2)
    row = config.ladder[0]
    expected = [each.distance for each in finished.results(row, 2)]
    assert [each.distance for each in study.results(row, 2)] == pytest.approx(expected, rel=1e-3)


def test_training_that_was_cut_short_goes_on_as_if_it_had_not_been(finished: Study, tmp_path: Path) -> None:
    data, stage = finished.place.images(), finished.config.teacher.model_copy(update={"steps": 6, "save_every": 2})

    def trained(steps: int, state: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        model = DiT(finished.config.model)
        cut = stage.model_copy(update={"steps": steps})
        train_model(model, data, cut, DiffusionConfig(), class_dropout=0.1, seed=3, state_path=state)
        return model.state_dict()

    unbroken = trained(6, None)
    trained(4, tmp_path / "state")
    for name, value in trained(6, tmp_path / "state").items():
        assert torch.equal(value, unbroken[name]), name


def test_a_loss_that_is_not_finite_ends_the_run(finished: Study) -> None:
    model = DiT(finished.config.model)
    nn.init.constant_(model.final_layer.linear.bias, float("nan"))
    with pytest.raises(DivergedError, match="at step 0"):
        train_model(model, finished.place.images(), finished.config.qat, DiffusionConfig(), class_dropout=0.1, seed=0)


class _Knowing(nn.Module):
    """Predicts the one image that there is."""

    def __init__(self, config: ModelConfig, image: torch.Tensor) -> None:
        super().__init__()
        self.config, self.image = config, image

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.image.expand_as(x)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_every_sampler_ends_at_what_the_model_predicts(finished: Study, sampler: Any) -> None:
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    model: Any = _Knowing(finished.config.model, image)
    settings = SamplerConfig(sampler=sampler, steps=5)
    drawn, classes = draw_samples(model, 7, 0, settings, DiffusionConfig(prediction_type="sample"))
    torch.testing.assert_close(drawn, image.expand(7, -1, -1, -1), atol=2e-2, rtol=0)
    assert classes.tolist() == [i % CLASSES for i in range(7)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"modle": 1}, "modle: Extra inputs"),
        ({"model": {"in_channels": 3}}, "in_channels must be 1"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"extras": [{"name": "AMPN", "quant": {}}]}, "same name"),
        ({"ladder": [{"name": "x", "quant": {"activation": "gauss"}}]}, r"ladder\.0\.quant\.activation"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_study(write_study(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"num_classes": 4}, "num_classes is 4, but the data has 3"), ({"input_size": 12}, "input_size is 12")],
)
def test_data_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Study(load_study(write_study(tmp_path, {"model": changes})), tmp_path / "out")


def test_digests_follow_what_matters(finished: Study) -> None:
    config = finished.config
    spec = finished.row_spec(config.ladder[0], 2, 0)
    assert spec is not None
    longer = config.model_copy(update={"qat": config.qat.model_copy(update={"steps": 4})})
    other = Study(longer, finished.place.folder).row_spec(config.ladder[0], 2, 0)
    assert other is not None
    assert other.digest != spec.digest
    assert other.teacher.digest == spec.teacher.digest
    renamed = config.ladder[0].model_copy(update={"name": "other"})
    same = finished.row_spec(renamed, 2, 0)
    assert same is not None
    assert same.digest == spec.digest


def test_directions_compare_a_row_with_the_one_above(finished: Study) -> None:
    found = [(each.row, each.above, each.width) for each in directions(finished)]
    assert ("RobustQuantizer", "baseline", 2) in found
    assert ("no rotation", "AMPN", 2) in found
    assert ("no rotation", "AMPN", 4) not in found


def test_intervals_are_student_s() -> None:
    # A textbook case: 1, 2, 3 have mean 2 and a half-width of 4.303 / sqrt(3).
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.high - 2) == (2, pytest.approx(4.303 / math.sqrt(3)))
    assert mean_interval([5.0]).high == math.inf


@given(values=st.lists(st.floats(0.01, 100), min_size=1, max_size=14), factor=st.floats(0.01, 100))
def test_a_constant_ratio_is_found_without_doubt(values: list[float], factor: float) -> None:
    found = ratio_interval([factor * value for value in values], values)
    assert found.value == pytest.approx(factor, rel=1e-6)
    if len(values) > 1:
        assert found.low == pytest.approx(factor, rel=1e-5)
        assert found.high == pytest.approx(factor, rel=1e-5)
