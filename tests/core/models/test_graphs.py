"""Recordings: rounded up to buckets, filled up without a trace, recorded again for another table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny
from torch import Tensor

from robuq_core.models.graphs import GraphedDenoise, Outputs, bucket, buckets
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.pipeline import RowSpec, Sampler


class Recorder:
    """Replays by calling again: what a graph does, on a CPU."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            for out, result in zip(tensors(outputs), tensors(run()), strict=True):
                out.copy_(result)

        return replay, outputs


def tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@given(st.integers(1, 2000))
def test_buckets_hold_their_rows_and_waste_little(rows: int) -> None:
    size = bucket(rows)
    assert size >= rows
    assert bucket(size) == size
    assert size in buckets(rows)
    assert size < 2 * rows if rows < 8 else size <= 1.5 * rows


def test_buckets_are_few() -> None:
    assert buckets(64) == (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    assert buckets(20) == (1, 2, 4, 8, 12, 16, 24)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> PackedDiT:
    path = tmp_path_factory.mktemp("graphs") / "tiny.safetensors"
    write_tiny(path)
    model = Sampler.from_checkpoint(path, backend="cpu", threads=1).model
    assert isinstance(model, PackedDiT)
    return model


def test_replays_are_the_eager_forward(network: PackedDiT) -> None:
    recorder = Recorder()
    graphed = GraphedDenoise(network.denoise, recorder)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 4, 9, 11, 2, 3):
        x = torch.randn(rows, 3, 16, 16, generator=generator)
        slots = network.conditioning.slots(list(range(rows)), [1] * rows)
        table = network.conditioning.table
        with torch.inference_mode():
            assert torch.equal(graphed(x, slots, table), network.denoise(x, slots, table))
    assert recorder.recorded == 4  # 1, 4, 12 and 2


def test_another_table_is_recorded_anew(network: PackedDiT) -> None:
    recorder = Recorder()
    graphed = GraphedDenoise(network.denoise, recorder)
    x, slots = torch.zeros(1, 3, 16, 16), network.conditioning.slots([5], [2])
    table = network.conditioning.table
    with torch.inference_mode():
        first = graphed(x, slots, table).clone()
        second = graphed(x, slots, table * 2)
    assert recorder.recorded == 2
    assert not torch.equal(first, second)


MIXED = [
    RowSpec(i % 10, i, 3 + i % 4, (1.0, 2.0)[i % 2], ("ddim", "ddpm", "dpmsolver++")[i % 3], cache_interval=1 + i % 3)
    for i in range(9)
]


def generated(sampler: Sampler, specs: list[RowSpec]) -> list[Tensor]:
    rows = [sampler.start(spec) for spec in specs]
    sampler.finish(rows)
    return [row.x.cpu() for row in rows]


def test_rows_that_keep_their_blocks_are_recorded_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    sampler = Sampler.from_checkpoint(path, backend="cpu", threads=1)
    expected = generated(sampler, MIXED)
    model, plain, keeping = sampler.model, Recorder(), Recorder()
    assert isinstance(model, PackedDiT)
    monkeypatch.setattr(model, "_run", GraphedDenoise(model.denoise, plain))
    monkeypatch.setattr(model, "_run_keeping", GraphedDenoise(model.denoise_keeping, keeping))
    assert all(map(torch.equal, generated(sampler, MIXED), expected))
    assert plain.recorded
    assert keeping.recorded
    generated(sampler, MIXED[::3])
    recorded = keeping.recorded
    generated(sampler, [spec for spec in MIXED if spec.cache_interval == 1])
    assert keeping.recorded == recorded


@pytest.mark.gpu
def test_a_gpu_generates_the_same_alone_and_among_others(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    sampler = Sampler.from_checkpoint(path, device="cuda")
    assert sampler.warm_up_rows(20)[-1] == 20
    together = generated(sampler, MIXED)
    for spec, expected in zip(MIXED, together, strict=True):
        assert torch.equal(generated(sampler, [spec])[0], expected)
    # The reference backend on the CPU agrees but for codes that fall the other way.
    reference = Sampler.from_checkpoint(path, backend="reference")
    row = reference.start(MIXED[0])
    reference.step([row])
    mine = sampler.start(MIXED[0])
    sampler.step([mine])
    assert float((mine.x.cpu() - row.x).norm() / row.x.norm()) < 0.05
