"""The training loop: the same numbers on every run, however often it was stopped, and ends that say why."""

import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import (
    make_config,
    signalled,
    state_of,
    tensors_of,
    train,
    train_signalled,
    write_config,
    write_photos,
)
from torch import Tensor

from robuq_core.models.dit import DiT
from robuq_core.quant import ternary
from train import trainer
from train.config import StageConfig, TrainConfig, load_config
from train.data import BatchSource
from train.evaluation.samples import generate, load_sampler
from train.run import Run
from train.state import EMA, State, StateError, find_state, read_state
from train.trainer import Trainer, TrainingError, learning_rate

LONG = {"teacher": {"steps": 250, "save_every": 7, "log_every": 3}}


def assert_equal_states(first: State, second: State) -> None:
    """In every number that training continues from."""
    assert first.step == second.step
    left, right = tensors_of(first), tensors_of(second)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert first.digest == second.digest


def logged_steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "teacher.log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> State:
    """The state at the end of a long run that nothing disturbed."""
    config = make_config(tmp_path_factory.mktemp("unbroken"), LONG)
    train(config)
    return state_of(config)


@pytest.mark.slow
@pytest.mark.parametrize(("killed_in", "step", "left"), [("teacher", 17, {7, 14}), ("save", 14, {7})])
def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(
    tmp_path: Path, unbroken: State, killed_in: str, step: int, left: set[int]
) -> None:
    path = write_config(tmp_path, LONG)
    config = load_config(path, [])
    process = train_signalled("teacher", path, signalled(killed_in, step, signal.SIGKILL))
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = state_of(config).step
    assert resumed in left

    train(config)
    assert_equal_states(state_of(config), unbroken)
    assert logged_steps(config.run_dir) == list(range(3, 251, 3))
    assert [start["from_step"] for start in state_of(config).history] == [0, resumed]


@pytest.mark.slow
def test_a_terminated_run_saves_its_step_and_ends_with_the_same_numbers(tmp_path: Path, unbroken: State) -> None:
    path = write_config(tmp_path, LONG)
    config = load_config(path, [])
    process = train_signalled("teacher", path, signalled("teacher", 17, signal.SIGTERM))
    # Not 0: a script that goes on to the next stage must not take this for a finished one.
    assert process.returncode == 2
    assert state_of(config).step == 18
    assert "stopped by SIGTERM at step 18 of 250" in process.stderr
    assert "Traceback" not in process.stderr
    train(config)
    assert_equal_states(state_of(config), unbroken)


class Crash(Exception):
    """What no handler expects."""


@settings(max_examples=8)
@given(save_every=st.integers(1, 5), crashes=st.lists(st.integers(0, 11), min_size=1, max_size=3))
def test_a_crash_at_any_step_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, save_every: int, crashes: list[int]
) -> None:
    root = tmp_path_factory.mktemp("crash")
    stage = {"steps": 12, "save_every": save_every}
    whole = make_config(root, {"teacher": stage, "run_dir": str(root / "whole")})
    train(whole)
    broken = make_config(root, {"teacher": stage, "run_dir": str(root / "broken")})
    for crash in crashes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchSource, "batch", failing_at(crash, BatchSource.batch))
            try:
                train(broken)
            except Crash:
                assert (state := find_state(broken.run_dir / "states" / "teacher")) is None or state.step <= crash
    train(broken)
    assert_equal_states(state_of(whole), state_of(broken))
    assert logged_steps(broken.run_dir) == list(range(1, 13))


def failing_at(step: int, batch: Any) -> Any:
    def wrapper(source: BatchSource, wanted: int, *share: int) -> tuple[Tensor, Tensor]:
        if wanted == step:
            raise Crash
        result: tuple[Tensor, Tensor] = batch(source, wanted, *share)
        return result

    return wrapper


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    final = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        config = make_config(tmp_path, {"seed": seed, "run_dir": str(tmp_path / name)})
        torch.manual_seed(len(name))
        train(config)
        final[name] = state_of(config)
    assert_equal_states(final["first"], final["again"])
    other = tensors_of(final["other"], "model")
    first = tensors_of(final["first"], "model")
    assert all(not torch.equal(value, other[name]) for name, value in first.items() if "weight" in name)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "one_each", per_class=1)
    data = {"path": str(photos), "flip_probability": 0}
    config = make_config(tmp_path, {"teacher": {"steps": 150, "log_every": 25}, "class_dropout": 0, "data": data})
    train(config)
    losses = [json.loads(line)["loss"] for line in (config.run_dir / "teacher.log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_ends_the_run_and_keeps_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = make_config(tmp_path, {"teacher": {"save_every": 1, "grad_clip": None}})
    whole = make_config(tmp_path, {"run_dir": str(tmp_path / "whole")})
    compute = trainer.diffusion_loss

    def spoiled(output: Tensor, *rest: Any) -> Tensor:
        loss = compute(output, *rest)
        if next(calls) < 3:
            return loss
        # The square root's slope at 0 is infinite: a finite loss with a gradient that is not.
        return loss * math.nan if what == "loss" else loss + (output * 0).sum().abs().sqrt()

    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "diffusion_loss", spoiled)
        with pytest.raises(TrainingError, match=r"at step 3; lower teacher\.lr"):
            train(config)
    state = state_of(config)
    assert state.step == 3
    assert all(bool(value.isfinite().all()) for value in tensors_of(state).values())

    unclipped = make_config(tmp_path, {"run_dir": str(whole.run_dir), "teacher": {"grad_clip": None}})
    train(unclipped)
    train(config)
    assert_equal_states(state_of(config), state_of(whole))


def test_a_spoiled_step_is_found_before_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are looked at every few steps; the step that is named is still the right one."""
    config = make_config(tmp_path, {"teacher": {"steps": 20, "save_every": 8, "log_every": 20}})
    compute = trainer.diffusion_loss
    calls = iter(range(100))

    def spoiled(output: Tensor, *rest: Any) -> Tensor:
        return compute(output, *rest) * (math.nan if next(calls) == 9 else 1)

    monkeypatch.setattr(trainer, "diffusion_loss", spoiled)
    with pytest.raises(TrainingError, match=r"at step 9; lower teacher\.lr"):
        train(config)
    state = state_of(config)
    assert state.step == 8
    assert all(bool(value.isfinite().all()) for value in tensors_of(state).values())


def test_held_out_figures_change_nothing_in_the_training(tmp_path: Path) -> None:
    plain = make_config(tmp_path, {"run_dir": str(tmp_path / "plain")})
    watched = make_config(tmp_path, {"run_dir": str(tmp_path / "watched"), "teacher": {"eval_every": 3}})
    train(plain)
    train(watched)
    assert_equal_states(state_of(plain), state_of(watched))
    lines = [json.loads(line) for line in (watched.run_dir / "teacher.log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert found.keys() == {3, 6}
    assert found[3] != found[6]
    sheets = sorted(path.name for path in (watched.run_dir / "samples").iterdir())
    assert sheets == ["teacher-0000003.png", "teacher-0000006.png"]


def test_states_are_kept_by_step(tmp_path: Path) -> None:
    """A kept state is what a run ends with at that step, also when later steps have replaced the last one."""
    short = make_config(
        tmp_path, {"run_dir": str(tmp_path / "short"), "teacher": {"lr_schedule": "constant", "steps": 4}}
    )
    stage = {"lr_schedule": "constant", "keep_every": 4, "save_every": 2}
    kept = make_config(tmp_path, {"run_dir": str(tmp_path / "kept"), "teacher": stage})
    train(short)
    train(kept)
    states = kept.run_dir / "states" / "teacher"
    assert sorted(path.name for path in states.iterdir()) == ["step-0000004", "step-0000006"]
    assert_equal_states(read_state(states / "step-0000004"), state_of(short))
    assert state_of(kept).step == 6
    sampler, _ = load_sampler(Run(kept), "teacher", states / "step-0000004")
    expected, _ = load_sampler(Run(short), "teacher")
    assert torch.equal(generate(sampler, [0, 1], 0), generate(expected, [0, 1], 0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"depth": 2}}, r"trained with model\.depth 1, but the configuration says 2"),
        ({"model": {"hidden_size": 48}}, r"model\.hidden_size 24"),
        ({"model": {"num_heads": 4}}, r"model\.num_heads 2"),
        ({"diffusion": {"prediction_type": "epsilon"}}, r"diffusion\.prediction_type sample"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path: Path, changes: Mapping[str, Any], expected: str) -> None:
    train(make_config(tmp_path))
    config = make_config(tmp_path, {**changes, "run_dir": str(tmp_path / "run")})
    with pytest.raises(StateError, match=expected) as caught:
        train(config)
    assert str(config.run_dir / "states" / "teacher") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_trains_what_a_cpu_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"model": {"learn_sigma": True}, "qat": {"distill_weight": 1.0}}
    config = make_config(tmp_path, changes)
    train(config)
    train(config, "qat")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(make_config(tmp_path, {**changes, "teacher": {"steps": 8}}))
    assert state_of(config).step == 8


def test_the_log_drops_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train(config)
    with (config.run_dir / "teacher.log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    train(make_config(tmp_path, {"teacher": {"steps": 8}}))
    assert logged_steps(config.run_dir) == list(range(1, 9))


def test_every_class_and_the_null_class_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, {"class_dropout": 0.4, "teacher": {"steps": 20}})
    seen: list[int] = []
    forward = DiT.forward

    def watched(model: DiT, x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        seen.extend(classes.tolist())
        return forward(model, x, timesteps, classes)

    monkeypatch.setattr(DiT, "forward", watched)
    train(config)
    assert set(seen) == set(range(config.model.num_classes + 1))
    assert seen.count(config.model.null_row) / len(seen) == pytest.approx(0.4, abs=0.15)


def test_codes_of_a_weight_are_made_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each part of a batch, and with the very same numbers."""
    train(make_config(tmp_path))
    calls, ternarize = list[Tensor](), ternary.ternarize
    monkeypatch.setattr(ternary, "ternarize", lambda weight, scale: (calls.append(weight), ternarize(weight, scale))[1])
    states = []
    for held in (True, False):
        monkeypatch.setattr(trainer, "repeats_forwards", lambda stage, held=held: held)
        calls.clear()
        config = make_config(tmp_path, {"qat": {"accumulate": 2, "activation_checkpointing": True}})
        layers, steps = 5, config.qat.steps
        train(config, "qat", redo=True)
        assert len(calls) == layers * steps * (1 if held else 4)
        states.append(state_of(config, "qat").digest)
    assert states[0] == states[1]


@given(
    steps=st.integers(2, 10**6),
    warmup=st.integers(0, 1000),
    ratio=st.just(0.0) | st.floats(1e-6, 1),
    schedule=st.sampled_from(["constant", "cosine"]),
)
def test_the_rate_warms_up_and_ends_where_asked(steps: int, warmup: int, ratio: float, schedule: Any) -> None:
    stage = StageConfig(steps=steps, warmup_steps=warmup, final_lr_ratio=ratio, lr_schedule=schedule, lr=1e-3)
    rates = [learning_rate(stage, step) for step in sorted({0, min(warmup, steps), steps // 2, steps})]
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) or ratio == 0 for rate in rates)
    if warmup:
        assert rates[0] == pytest.approx(1e-3 / warmup)
    if steps > warmup:
        assert learning_rate(stage, steps) == pytest.approx(1e-3 * (ratio if schedule == "cosine" else 1), abs=1e-12)
        falling = [learning_rate(stage, warmup + (steps - warmup) * i // 10) for i in range(11)]
        assert falling == sorted(falling, reverse=True)


def test_further_averages_are_those_of_their_decays(tmp_path: Path) -> None:
    """Also after a stop; the first one and the training stay what they are without."""
    stage = {"ema_decay": 0.9, "lr_schedule": "constant"}
    plain = make_config(tmp_path, {"teacher": stage, "run_dir": str(tmp_path / "plain")})
    low = make_config(tmp_path, {"teacher": {**stage, "ema_decay": 0.1}, "run_dir": str(tmp_path / "low")})
    several = {**stage, "more_ema_decays": [0.1, 0.5]}
    train(plain)
    train(low)
    train(make_config(tmp_path, {"teacher": {**several, "steps": 4}}))
    config = make_config(tmp_path, {"teacher": several})
    train(config)

    def weights(run: Run) -> dict[str, Tensor]:
        return run.teacher().state_dict()

    found = [weights(Run(config)), weights(Run(config, ema=0.1)), weights(Run(config, ema=0.5))]
    for ours, theirs in ((found[0], weights(Run(plain))), (found[1], weights(Run(low)))):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(not torch.equal(value, found[1][name]) for name, value in found[2].items())
    with pytest.raises(StateError, match=r"no average of decay 0\.3; choose one of the stage's more_ema_decays"):
        Run(config, ema=0.3).teacher()


@given(decay=st.floats(0, 0.9999), step=st.integers(0, 10**6), before=st.floats(-5, 5), now=st.floats(-5, 5))
def test_the_average_moves_by_its_decay(decay: float, step: int, before: float, now: float) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, before)
    ema = EMA(model, decay)
    torch.nn.init.constant_(model.weight, now)
    ema.update(model, step)
    used = min(decay, (1 + step) / (10 + step))
    assert float(ema.shadow["weight"]) == pytest.approx(used * before + (1 - used) * now, abs=1e-5)


def test_a_teacher_pulls_the_student_only_with_a_weight(tmp_path: Path) -> None:
    config: TrainConfig = make_config(tmp_path)
    model, other = DiT(config.model), DiT(config.model)
    torch.nn.init.normal_(other.final_layer.linear.weight)
    source = BatchSource(Run(config).photos(), 0.5, 4, config.seed)
    alone = Trainer(config, config.qat, model, source, tmp_path / "a", teacher=other)
    pulled = Trainer(
        config, config.qat.model_copy(update={"distill_weight": 0.5}), model, source, tmp_path / "b", teacher=other
    )
    assert alone.teacher is None
    with torch.no_grad():
        batch = alone._batch(0)
        assert float(pulled._loss(batch)) > float(alone._loss(batch))
