"""Several processes train what one would: same losses, same weights, through kills and changes of their number."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import several_processes
from several_processes import train_stage
from synthetic_run import SIGNALLED, merged, signalled, tensors_of, train, write_config
from synthetic_run import state_of as state_in
from torch import Tensor

from train.config import ConfigError, StageConfig, TrainConfig, load_config
from train.state import State
from train.trainer import check_shares

pytestmark = pytest.mark.slow

STAGE = {"batch_size": 12, "steps": 6, "grad_clip": 0.05, "ema_decay": 0.9}
SHARED = {
    "model": {"depth": 2, "learn_sigma": True},
    "quant": {"rank": 2, "adaln_rank": 0},
    "teacher": {**STAGE, "lr_schedule": "constant"},
    "qat": {**STAGE, "lr": 1e-3, "distill_weight": 0.5},
}


def configure(root: Path, name: str, changes: Mapping[str, Any]) -> Path:
    """A configuration of its own run folder, on the photos of ``root``."""
    tree = merged({**SHARED, "run_dir": str(root / name)}, changes)
    return write_config(root, tree, f"{name}.yaml")


def curve(config: Path, stage: str = "teacher") -> list[tuple[float, float]]:
    """``(loss, gradient norm)`` of every step."""
    lines = (load_config(config, []).run_dir / f"{stage}.log.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def state_of(config: Path, stage: str = "teacher") -> State:
    return state_in(load_config(config, []), stage)


def model_in(config: Path) -> dict[str, Tensor]:
    return tensors_of(state_of(config), "model")


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Relative Euclidean distance of two sets of weights."""
    assert left.keys() == right.keys()
    apart = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return math.sqrt(apart / sum(float(value.square().sum()) for value in left.values()))


def assert_same_training(one: Path, several: Path, stage: str = "teacher") -> None:
    """To rounding; in a quantised network that may move a code over the edge of its cell, and the steps that follow."""
    near, apart = (1e-2, 1e-2) if stage == "qat" else (2e-4, 1e-4)
    assert curve(several, stage) == [pytest.approx(point, rel=near) for point in curve(one, stage)]
    first, second = state_of(one, stage), state_of(several, stage)
    assert first.step == second.step
    for part in ("model", "ema", "optimiser"):
        assert distance(tensors_of(first, part), tensors_of(second, part)) < (
            apart if part != "optimiser" else 100 * apart
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """Teacher and student of one process."""
    path = configure(root, "one", {})
    train_stage("teacher", load_config(path, []))
    train_stage("qat", load_config(path, []))
    return path


@pytest.fixture(scope="module")
def several(root: Path, one: Path) -> dict[str, Path]:
    """The same runs by two processes, and others that go on from where one process was."""
    parts = {"accumulate": 2, "activation_checkpointing": True}
    paths = {
        "ddp": configure(root, "ddp", {"teacher": parts, "qat": parts, "compile": True}),
        "fsdp": configure(
            root, "fsdp", {"teacher": {"parallel": "fsdp", "keep_every": 4}, "qat": {"parallel": "fsdp"}}
        ),
        "fsdp-parts": configure(root, "fsdp-parts", {"qat": {"parallel": "fsdp", **parts}, "compile": True}),
        "halfway": configure(root, "halfway", {"teacher": {"parallel": "fsdp", "steps": 3}}),
        "from-one": configure(root, "from-one", {"teacher": {"parallel": "fsdp"}}),
        "bf16": configure(root, "bf16", {"teacher": {"gradients": "bf16"}}),
        "bf16-fsdp": configure(root, "bf16-fsdp", {"teacher": {"gradients": "bf16", "parallel": "fsdp"}}),
        "spoiled": configure(root, "spoiled", {"teacher": {"save_every": 1}}),
    }
    train_stage("teacher", load_config(paths["from-one"], ["teacher.steps=3"]))
    run_dir = load_config(paths["fsdp-parts"], []).run_dir
    shutil.copytree(load_config(one, []).run_dir / "states" / "teacher", run_dir / "states" / "teacher")
    plan: list[str | Path] = []
    for name in ("ddp", "fsdp"):
        plan += ["teacher", paths[name], "qat", paths[name]]
    plan += ["qat", paths["fsdp-parts"], "teacher", paths["halfway"], "teacher", paths["from-one"]]
    plan += ["samples", paths["ddp"], "teacher", paths["bf16"], "teacher", paths["bf16-fsdp"]]
    ends = several_processes.train(*plan, "spoiled", paths["spoiled"], TEST_BACKEND="aot_eager", TEST_SPOIL="1")
    assert [code for code, _ in ends] == [2, 2], ends  # the last of them ends all
    (root / "ends.json").write_text(json.dumps(ends))
    return paths


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_a_teacher_as_one_does(one: Path, several: dict[str, Path], how: str) -> None:
    assert_same_training(one, several[how])


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp-parts"])
def test_two_processes_quantise_as_one_does(one: Path, several: dict[str, Path], how: str) -> None:
    assert_same_training(one, several[how], "qat")


def test_two_processes_draw_the_samples_of_one(several: dict[str, Path]) -> None:
    """Each a file for every second batch, and its features; one process alone finds no sample left to generate."""
    config = load_config(several["ddp"], [])
    made = {path: path.stat().st_mtime_ns for path in (config.run_dir / "samples").glob("*.npy")}
    assert sorted(path.stem for path in made) == ["0000000", "0000004", "0000008", "0000012"]
    features = sorted(path.stem for path in (config.run_dir / "samples").glob("*.npz"))
    assert features == ["0000000-of-0", "0000004-of-1", "0000008-of-0", "0000012-of-1"]
    both = several_processes.draw_samples(config).images[:]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    shutil.rmtree(config.run_dir / "samples")
    alone = several_processes.draw_samples(config).images[:]
    assert int((both.int() - alone.int()).abs().max()) <= 2  # products round by the number of threads


@pytest.mark.parametrize("how", ["bf16", "bf16-fsdp"])
def test_gradients_in_bf16_train_nearly_the_same(one: Path, several: dict[str, Path], how: str) -> None:
    """Rounding to 8 bits moves a gradient by up to 0.4%: seen, and small."""
    apart = distance(model_in(one), model_in(several[how]))
    assert 1e-4 < apart < 5e-2


def test_a_lost_file_of_one_process_is_one_error(several: dict[str, Path], tmp_path: Path) -> None:
    path = configure(tmp_path, "lost", {"teacher": {"parallel": "fsdp", "steps": 8}})
    run_dir = load_config(path, []).run_dir
    shutil.copytree(load_config(several["fsdp"], []).run_dir / "states", run_dir / "states")
    lost = sorted(state_of(path).folder.glob("*.safetensors"))[1]
    lost.unlink()
    (first, said), (second, repeated) = several_processes.train("teacher", path)
    assert first == second == 2, said + repeated
    assert f"{lost}: missing; put it back" in said
    assert "Traceback" not in said + repeated
    assert "error" not in repeated


def test_any_number_of_processes_continues_a_state(one: Path, several: dict[str, Path]) -> None:
    assert_same_training(one, several["from-one"])
    assert state_of(several["halfway"]).step == 3
    copy = several["halfway"].with_name("halfway-alone.yaml")
    copy.write_text(several["halfway"].read_text())
    train_stage("teacher", load_config(several["halfway"], ["teacher.steps=6", "teacher.parallel=ddp"]))
    assert_same_training(one, copy)
    assert [start["processes"] for start in state_of(copy).history] == [2, 1]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_three_processes_share_an_odd_batch(tmp_path: Path, how: str) -> None:
    stage = {"batch_size": 15, "parallel": how}
    alone, three = (configure(tmp_path, name, {"teacher": stage}) for name in ("alone", "three"))
    train_stage("teacher", load_config(alone, []))
    ends = several_processes.train("teacher", three, world=3, TEST_BACKEND="aot_eager")
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert len(state_of(three).files) == 3
    assert_same_training(alone, three)


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_one_message(
    root: Path, several: dict[str, Path]
) -> None:
    (first, said), (second, repeated) = json.loads((root / "ends.json").read_text())
    assert first == second == 2, said + repeated
    assert "loss is nan" in said
    assert "at step 2; lower teacher.lr" in said
    assert "Traceback" not in said + repeated
    assert "error" not in repeated
    state = state_of(several["spoiled"])
    assert state.step == 2
    assert all(bool(value.isfinite().all()) for value in tensors_of(state).values())


def test_a_killed_and_a_terminated_process_lose_nothing(root: Path, one: Path) -> None:
    """Two processes that torchrun started, one killed; two that go on, one terminated; one that ends the work."""
    changes = {"teacher": {"steps": 150, "save_every": 7, "log_every": 5, "parallel": "fsdp"}, "model": {"depth": 1}}
    whole = configure(root, "unbroken", changes)
    train(load_config(whole, []))
    broken = configure(root, "broken", changes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(SIGNALLED), "teacher", "-c", str(broken)]
    launcher = subprocess.run(
        [*torchrun, *arguments],
        cwd=several_processes.REPOSITORY,
        env={**os.environ, **signalled("teacher", 17, signal.SIGKILL, rank=1)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert launcher.returncode != 0
    assert [each.pid for each in psutil.process_iter(["cmdline"]) if str(broken) in (each.info["cmdline"] or ())] == []
    assert "process 0 of 2 lost another one" in launcher.stderr
    assert state_of(broken).step in (7, 14)  # the latter may not have been whole yet

    processes = several_processes.start(*arguments, **signalled("teacher", 30, signal.SIGTERM, rank=1))
    (first, said), (second, repeated) = several_processes.finish(processes)
    assert first == second == 2, said + repeated
    stopped = state_of(broken).step
    assert 31 <= stopped <= 40  # the processes agree every 10 steps
    assert f"stopped by SIGTERM at step {stopped} of 150" in said
    assert "error" not in repeated

    train(load_config(broken, []))
    assert distance(model_in(whole), model_in(broken)) < 1e-2
    assert distance(tensors_of(state_of(whole), "ema"), tensors_of(state_of(broken), "ema")) < 1e-2
    lines = map(json.loads, (load_config(broken, []).run_dir / "teacher.log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == list(range(5, 151, 5))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of accumulate 4"):
        StageConfig(batch_size=6, accumulate=4)
    stage = StageConfig(batch_size=12, accumulate=2)
    check_shares(stage, "qat.batch_size", 3)
    with pytest.raises(ConfigError, match=r"qat\.batch_size 12 must be a multiple of 8: 4 processes times accumulate"):
        check_shares(stage, "qat.batch_size", 4)


def test_parts_of_a_batch_give_the_step_of_the_whole(tmp_path: Path) -> None:
    whole: TrainConfig = load_config(configure(tmp_path, "whole", {}), [])
    parts = {"accumulate": 3, "activation_checkpointing": True}
    divided = configure(tmp_path, "divided", {"teacher": parts, "qat": parts})
    for stage in ("teacher", "qat"):
        train_stage(stage, whole)
        train_stage(stage, load_config(divided, []))
        assert_same_training(tmp_path / "whole.yaml", divided, stage)
