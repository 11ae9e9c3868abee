"""Several processes train what one would: same losses, same weights, through kills and changes of their number."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import several_processes
import torch
from several_processes import train_stage
from synthetic_run import SIGNALLED, merged, signalled, write_config
from torch import Tensor

from train.config import ConfigError, StageConfig, TrainConfig, load_config
from train.stages import train_teacher
from train.state import StateError, load_state
from train.state_file import read_state_file
from train.state_shards import is_pointer, save_shards, shards_folder
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


def state_of(config: Path, stage: str = "teacher") -> dict[str, Any]:
    return load_state(load_config(config, []).run_dir / f"{stage}.pt")


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
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        assert distance(first[part], second[part]) < apart
    assert first["optimiser"]["state"].keys() == second["optimiser"]["state"].keys()
    for i, moments in first["optimiser"]["state"].items():
        assert moments["step"] == second["optimiser"]["state"][i]["step"]
        assert distance(moments, second["optimiser"]["state"][i]) < 100 * apart


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
    run_dir.mkdir()
    (run_dir / "teacher.pt").write_bytes((load_config(one, []).run_dir / "teacher.pt").read_bytes())
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
    """The file that both have written, and what one process makes of it, which must find nothing left to do."""
    config = load_config(several["ddp"], [])
    both = np.load(config.run_dir / "samples" / "images.npy")
    notes = {rank: json.loads((config.run_dir / "samples" / f"progress-{rank}.json").read_text()) for rank in (0, 1)}
    assert sorted(notes[0]["done"] + notes[1]["done"]) == [0, 4, 8, 12]
    shutil.rmtree(config.run_dir / "samples")
    alone = np.load(several_processes.draw_samples(config))
    assert np.abs(both.astype(int) - alone.astype(int)).max() <= 2  # products round by the number of threads


def test_a_kept_state_of_shards_is_whole(several: dict[str, Path]) -> None:
    run_dir = load_config(several["fsdp"], []).run_dir
    state = load_state(run_dir / "kept" / "teacher-0000004.pt")
    assert state["step"] == 4
    assert distance(state["model"], load_state(run_dir / "teacher.pt")["model"]) > 1e-3


@pytest.mark.parametrize("how", ["bf16", "bf16-fsdp"])
def test_gradients_in_bf16_train_nearly_the_same(one: Path, several: dict[str, Path], how: str) -> None:
    """Rounding to 8 bits moves a gradient by up to 0.4%: seen, and small."""
    apart = distance(state_of(one)["model"], state_of(several[how])["model"])
    assert 1e-4 < apart < 5e-2


def test_gradients_are_clipped_by_the_norm_of_the_whole_batch(several: dict[str, Path]) -> None:
    assert all(norm > STAGE["grad_clip"] for how in ("ddp", "fsdp") for _, norm in curve(several[how]))


def test_each_process_writes_its_slices(several: dict[str, Path]) -> None:
    path = load_config(several["fsdp"], []).run_dir / "teacher.pt"
    pointer = read_state_file(path)
    assert is_pointer(pointer)
    assert pointer["step"] == 6
    folder = shards_folder(path) / pointer["shards"]
    assert [each.name for each in shards_folder(path).iterdir()] == [folder.name]
    sizes = sorted(file.stat().st_size for file in folder.iterdir())
    assert len(sizes) == 2
    assert sizes[0] > 0.7 * sizes[1]
    assert not is_pointer(read_state_file(load_config(several["ddp"], []).run_dir / "teacher.pt"))


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_damaged_shards_are_refused(several: dict[str, Path], tmp_path: Path, damage: str) -> None:
    whole = load_config(several["fsdp"], []).run_dir
    for name in ("teacher.pt", "teacher.shards"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, tmp_path / name)
    shard = sorted(tmp_path.glob("teacher.shards/*/*"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flipped" else content[:-10])
    with pytest.raises(StateError, match=f"{shard.name}: {'missing' if damage == 'missing' else 'damaged'}"):
        load_state(tmp_path / "teacher.pt")


def test_shards_on_a_full_disk_leave_those_before(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    small, large = {"weight": torch.arange(10.0)}, {"weight": torch.zeros(100_000)}
    moments = {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(10)}}
    optimiser: dict[str, Any] = {"state": moments, "param_groups": []}

    def save(step: int, weights: dict[str, torch.Tensor]) -> None:
        average = {name: weight.clone() for name, weight in weights.items()}
        save_shards(path, step=step, model=weights, ema=average, optimiser=optimiser, history=[])

    save(1, small)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StateError, match=r"cannot write the training state .*File too large.* is intact") as caught:
            save(2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    state = load_state(path)
    assert state["step"] == 1
    assert torch.equal(state["ema"]["weight"], small["weight"])
    assert state["optimiser"]["state"][0]["step"] == 4
    save(2, large)
    assert [each.name for each in shards_folder(path).iterdir()] == ["step-00000002"]


def test_shards_go_on_from_a_file_and_a_file_from_shards(one: Path, several: dict[str, Path]) -> None:
    assert_same_training(one, several["from-one"])
    assert state_of(several["halfway"])["step"] == 3
    config = load_config(several["halfway"], ["teacher.steps=6", "teacher.parallel=ddp"])
    copy = several["halfway"].with_name("halfway-alone.yaml")
    copy.write_text(several["halfway"].read_text())
    train_stage("teacher", config)
    assert_same_training(one, copy)
    assert not shards_folder(config.run_dir / "teacher.pt").exists()
    assert [start["processes"] for start in state_of(copy)["history"]] == [2, 1]


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
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_killed_and_a_terminated_process_lose_nothing(root: Path, one: Path) -> None:
    """Two processes that torchrun started, one killed; two that go on, one terminated; one that ends the work."""
    changes = {"teacher": {"steps": 150, "save_every": 7, "log_every": 5, "parallel": "fsdp"}, "model": {"depth": 1}}
    whole = configure(root, "unbroken", changes)
    train_teacher(load_config(whole, []))
    broken = configure(root, "broken", changes)
    path = load_config(broken, []).run_dir / "teacher.pt"

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
    assert load_state(path)["step"] == 14

    processes = several_processes.start(*arguments, **signalled("teacher", 30, signal.SIGTERM, rank=1))
    (first, said), (second, repeated) = several_processes.finish(processes)
    assert first == second == 2, said + repeated
    stopped = load_state(path)["step"]
    assert 31 <= stopped <= 40  # the processes agree every 10 steps
    assert f"stopped by SIGTERM at step {stopped} of 150" in said
    assert "error" not in repeated

    train_teacher(load_config(broken, []))
    assert distance(state_of(whole)["model"], state_of(broken)["model"]) < 1e-2
    assert distance(state_of(whole)["ema"], state_of(broken)["ema"]) < 1e-2
    lines = map(json.loads, path.with_suffix(".log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == list(range(5, 151, 5))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of accumulate 4"):
        StageConfig(batch_size=6, accumulate=4)
    stage = StageConfig(batch_size=12, accumulate=2)
    check_shares(stage, "qat.batch_size", 3)
    with pytest.raises(ConfigError, match=r"qat\.batch_size 12 must be a multiple of 8: 4 processes times accumulate"):
        check_shares(stage, "qat.batch_size", 4)


def test_one_process_under_torchrun_is_a_lone_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import parallel

    monkeypatch.setenv("WORLD_SIZE", "1")
    with parallel.processes():
        assert (parallel.rank(), parallel.world_size()) == (0, 1)
        assert parallel.agree(torch.tensor(2.0), signal.SIGINT) == (2.0, signal.SIGINT)


def test_parts_of_a_batch_give_the_step_of_the_whole(tmp_path: Path) -> None:
    whole: TrainConfig = load_config(configure(tmp_path, "whole", {}), [])
    parts = {"accumulate": 3, "activation_checkpointing": True}
    divided = configure(tmp_path, "divided", {"teacher": parts, "qat": parts})
    for stage in ("teacher", "qat"):
        train_stage(stage, whole)
        train_stage(stage, load_config(divided, []))
        assert_same_training(tmp_path / "whole.yaml", divided, stage)
