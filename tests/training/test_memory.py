"""What is counted on tensors without contents is what a CPU allocates for the real ones."""

import copy
from pathlib import Path

import pytest
import torch
from synthetic_run import make_config
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.config import ConfigError, TrainConfig
from train.memory import LiveBytes, memory_table, step_memory, time_line
from train.parallel import checkpoint_blocks
from train.trainer import NoisyBatch, batch_loss, step_flops

pytestmark = pytest.mark.slow

WIDE = {"input_size": 32, "hidden_size": 96, "depth": 3, "learn_sigma": True}
BATCH = 8


def configure(root: Path, again: bool = False) -> TrainConfig:
    qat = {"batch_size": BATCH, "activation_checkpointing": again, "distill_weight": 1.0}
    return make_config(root, {"model": WIDE, "qat": qat, "quant": {"rank": 4}})


def allocated(config: TrainConfig, bf16: bool) -> tuple[int, int]:
    """Peak bytes that a forward and backward pass takes from the allocator, and those that autograd saves."""
    teacher = DiT(config.model)
    model = quantize_model(copy.deepcopy(teacher), config.quant)
    if config.qat.activation_checkpointing:
        checkpoint_blocks(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    shape = (BATCH, 3, WIDE["input_size"], WIDE["input_size"])
    batch = NoisyBatch(torch.randn(shape), torch.randn(shape), torch.arange(BATCH), torch.arange(BATCH) % 4)
    standing = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = batch_loss(model, batch, config.diffusion, context, teacher, 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, sum(saved.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_count_is_what_the_allocator_gives(tmp_path: Path, again: bool, bf16: bool) -> None:
    config = configure(tmp_path, again)
    counted = step_memory(config, config.qat, config.quant, bf16=bf16)
    peak, saved = allocated(config, bf16)
    assert counted["kept"] + counted["temporaries"] == pytest.approx(peak, rel=0.05)
    assert counted["kept"] == pytest.approx(saved, rel=0.1)


def test_less_memory_by_each_way_to_save_it(tmp_path: Path) -> None:
    config = configure(tmp_path)

    def count(world: int = 1, **changes: object) -> dict[str, int]:
        return step_memory(config, config.qat.model_copy(update=changes), config.quant, world=world)

    plain = count()
    assert count(activation_checkpointing=True)["kept"] < 0.3 * plain["kept"]
    halved = count(accumulate=2)
    assert halved["kept"] == pytest.approx(plain["kept"] / 2, rel=0.1)
    shared, sharded = count(world=2), count(world=2, parallel="fsdp")
    assert shared["moments"] == plain["moments"]
    assert shared["kept"] == sharded["kept"] == halved["kept"]
    assert sharded["moments"] == plain["moments"] / 2
    assert sharded["gathered"] > 0 == shared["gathered"]
    with pytest.raises(ConfigError, match="batch_size 8 must be a multiple of 3"):
        count(world=3)


def test_the_table_adds_up(tmp_path: Path) -> None:
    config = configure(tmp_path, again=True)
    lines = memory_table(config, "qat", 2).splitlines()
    figures = [line.split()[-2:] for line in lines[1:-2]]
    for column in range(2):
        *parts, total = (float(row[column]) for row in figures)
        assert sum(parts) == pytest.approx(total, abs=0.06)
    assert "batch_size 8 over 2 process(es)" in lines[-2]
    assert "activations are recomputed" in lines[-2]
    with pytest.raises(ConfigError, match="stage 'export': not one of teacher, warmup, qat"):
        memory_table(config, "export", 1)


def test_the_time_is_that_of_the_products_of_all_steps(tmp_path: Path) -> None:
    """One block of width 24: qkv, proj, fc1 and fc2 are 12 D^2 a token, adaLN 6 D^2 an image, of 4 tokens."""
    config = make_config(tmp_path)
    macs = 12 * 24**2 * 4 + 6 * 24**2
    assert step_flops(config, config.qat) == 2 * 3 * macs * 4
    again = config.qat.model_copy(update={"activation_checkpointing": True, "distill_weight": 1.0})
    assert step_flops(config, again) == 2 * 5 * macs * 4
    hours = 2 * 3 * macs * 4 * config.qat.steps / 2e6 / 3600  # two processes at 1 MFLOP/s
    assert f"{hours:.3g} hours" in time_line(config, "qat", 2, 1e-6)


def test_live_bytes_come_and_go() -> None:
    given = torch.zeros(100)
    with LiveBytes() as live:
        view = given[10:]
        first = view + 1
        assert live.now == 360
        second = first * 2
        del first
        assert (live.now, live.peak) == (360, 720)
        second.add_(1)
        assert live.now == 360
    del second
    assert live.now == 0
