"""States of training: whole or absent, saved beside training, and refused in one line where they are damaged."""

import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_run import make_config, state_of, tensors_of, train
from torch import Tensor

from train.config import TrainConfig
from train.state import Saver, State, StateError, exclusive, find_state, latest_state, read_state
from train.trainer import Trainer


def save(states: Path, step: int, tensors: Mapping[str, Tensor], *, wait: bool = True, **about: Any) -> Saver:
    saver = Saver()
    folder, about = states / f"step-{step:07d}", {"inputs": {"seed": 1}, **about}
    saver.save(State(folder=folder, step=step, finished=False, history=[], **about), tensors)
    if wait:
        saver.wait()
    return saver


def test_a_state_is_what_it_was_when_saving_began(tmp_path: Path) -> None:
    weight = torch.arange(1_000_000.0)
    saver = save(tmp_path / "qat", 7, {"model.weight": weight, "model.none": torch.zeros(3, 0)}, wait=False)
    weight.mul_(-1)  # training continues while the state is written
    saver.wait()
    state = latest_state(tmp_path / "qat")
    assert (state.step, state.finished, state.inputs) == (7, False, {"seed": 1})
    assert torch.equal(tensors_of(state)["model.weight"], torch.arange(1_000_000.0))
    assert [path.name for path in (tmp_path / "qat").iterdir()] == ["step-0000007"]


def test_later_states_replace_all_but_the_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100_000_000):
        save(tmp_path, step, {"model.weight": torch.full((2,), float(step))}, kept=step == 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000010", "step-100000000"]
    assert latest_state(tmp_path).step == 100_000_000


def test_a_kill_while_an_older_state_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 7, {"model.weight": torch.zeros(2)})
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda folder, **_: (folder / "state.json").unlink())
        save(tmp_path, 14, {"model.weight": torch.ones(2)})
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000014"]
    save(tmp_path, 21, {"model.weight": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000021"]


def test_a_full_disk_keeps_the_state_before(tmp_path: Path) -> None:
    save(tmp_path, 1, {"model.weight": torch.arange(10.0)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StateError, match=r"cannot write the training state .*File too large.* is intact") as caught:
            save(tmp_path, 2, {"model.weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    state = latest_state(tmp_path)
    assert state.step == 1
    assert torch.equal(tensors_of(state)["model.weight"], torch.arange(10.0))
    save(tmp_path, 2, {"model.weight": torch.zeros(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]


@pytest.fixture
def copied(trained: TrainConfig, tmp_path: Path) -> TrainConfig:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    return make_config(tmp_path, {"teacher": {"steps": 8}})


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_damaged_tensors_are_refused(copied: TrainConfig, damage: str) -> None:
    (file,) = state_of(copied).folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[:-10])
    expected = f"{file}: {'missing' if damage == 'missing' else 'damaged'}.* or delete {file.parent} to continue"
    for stage in ("teacher", "qat"):
        with pytest.raises(StateError, match=expected) as caught:
            train(copied, stage)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1', '{"step": "x", "finished": true}', "[" * 100_000])
def test_a_damaged_description_is_refused(copied: TrainConfig, content: str) -> None:
    path = state_of(copied).folder / "state.json"
    path.write_text(content)
    with pytest.raises(StateError, match=r"state\.json: not the description of a training state") as caught:
        train(copied)
    assert "\n" not in str(caught.value)


def test_a_state_without_a_tensor_of_the_model_is_refused(copied: TrainConfig) -> None:
    state = state_of(copied)
    tensors = tensors_of(state)
    for part in ("model.", "ema.", "optimiser."):
        missing = next(name for name in tensors if name.startswith(part))
        rest = {name: value for name, value in tensors.items() if name != missing}
        save(state.folder.parent, 7, rest, inputs=state.inputs)
        with pytest.raises(StateError, match=f"does not fit the configuration .*{missing} is only in the configured"):
            train(copied)


def test_a_claim_of_more_than_a_file_holds_is_refused(tmp_path: Path) -> None:
    """The offset of a slice, which a file states itself, must not make a reader allocate what it pleases."""
    from safetensors.torch import save_file

    from robuq_core.shards import read_all

    metadata = {"DCP_SHARDING_INFO": '{"model.weight": {"saved_offsets": [1000000000000]}}'}
    save_file({"model.weight": torch.zeros(4)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="claims more than it holds"):
        read_all(tmp_path, "model.")


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"qat does not exist: run the stage that writes it first"):
        latest_state(tmp_path / "states" / "qat")
    with pytest.raises(StateError, match="not a training state; give a folder"):
        read_state(tmp_path)


def test_states_of_single_files_are_named_with_the_way_on(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    torch.save({"step": 1}, config.run_dir / "teacher.pt")
    with pytest.raises(StateError, match=r"teacher\.pt: a state of an earlier version.*teacher\.pretrained"):
        train(config)


def test_two_runs_of_one_stage_do_not_mix(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with exclusive(config.run_dir / "states" / "teacher"):
        with pytest.raises(StateError, match="another process trains this stage"):
            train(config)
        with exclusive(config.run_dir / "states" / "qat"):
            pass
    train(config)


def test_what_a_kill_left_of_a_save_is_removed(copied: TrainConfig) -> None:
    states = state_of(copied).folder.parent
    (states / ".step-0000008").mkdir()
    (states / ".step-0000008" / "shard-00001-model-00001-of-00001.safetensors").write_text("half a state")
    train(copied)
    assert [path.name for path in states.iterdir()] == ["step-0000008"]
    assert set(state_of(copied).files) == {"shard-00001-model-00001-of-00001.safetensors"}


def test_training_does_not_wait_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a save is taken while the state is still being written."""
    import threading

    from train import state

    released, steps = threading.Event(), list[int]()
    digest, train_step = state._tensors_digest, Trainer._train_step

    def slow(path: Path) -> str:
        assert released.wait(60)
        return digest(path)

    def counted(trainer: Trainer, batch: Any) -> None:
        train_step(trainer, batch)
        steps.append(trainer.step)
        if trainer.step == 3:  # the save after step 2 began before
            assert find_state(trainer.states) is None
            released.set()

    monkeypatch.setattr(state, "_tensors_digest", slow)
    monkeypatch.setattr(Trainer, "_train_step", counted)
    config = make_config(tmp_path, {"teacher": {"save_every": 2}})
    train(config)
    assert steps == list(range(6))
    assert state_of(config).step == 6
