"""Step caching: which steps run the blocks, what the others stand on, and that a failure loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_floats_agree
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, write_tiny
from torch import Tensor

from robuq_core.models.packed_dit import PackedDiT
from robuq_core.pipeline import RowSpec, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    path: Path = tmp_path_factory.mktemp("step_cache") / "tiny.safetensors"
    write_tiny(path)
    return Sampler.from_checkpoint(path, threads=1)


@pytest.fixture(scope="module")
def network(sampler: Sampler) -> PackedDiT:
    assert isinstance(sampler.model, PackedDiT)
    return sampler.model


def block_rows(sampler: Sampler, spec: RowSpec, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By step, the rows that went through the blocks, counted where they run."""
    counts: list[int] = []
    network = sampler.model
    assert isinstance(network, PackedDiT)
    run_block, first = network.run_block, network.blocks[0]

    def counted(x: Tensor, modulation: Tensor, block: object) -> Tensor:
        counts[-1] += len(x) if block is first else 0
        return run_block(x, modulation, block)  # type: ignore[arg-type]

    monkeypatch.setattr(network, "run_block", counted)
    row = sampler.start(spec)
    while not row.done:
        counts.append(0)
        expected = row.block_rows
        sampler.step([row])
        assert counts[-1] == expected
    return counts


@pytest.mark.parametrize(
    ("steps", "cache_interval", "ran"),
    [
        (1, 3, [1]),
        (5, 1, [1, 1, 1, 1, 1]),
        (6, 2, [1, 1, 0, 1, 0, 1]),
        (7, 3, [1, 0, 0, 1, 0, 0, 1]),
        (4, 9, [1, 0, 0, 1]),
    ],
)
def test_blocks_run_at_the_first_step_and_back_from_the_last(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, steps: int, cache_interval: int, ran: list[int]
) -> None:
    plain, guided = (RowSpec(1, 5, steps, scale, "ddim", cache_interval=cache_interval) for scale in (1.0, 2.0))
    assert block_rows(sampler, plain, monkeypatch) == ran
    monkeypatch.undo()
    assert block_rows(sampler, guided, monkeypatch) == [2 * rows for rows in ran]


def test_guidance_that_sets_in_between_runs_the_blocks(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps at 999, 799, 599, 399, 199, 0: guidance from 599 on, and the delta without a class was never kept.
    spec = RowSpec(1, 5, 6, 2.0, "ddim", (0, 650), cache_interval=5)
    assert block_rows(sampler, spec, monkeypatch) == [1, 0, 2, 0, 0, 2]


@given(rows=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_kept_delta_is_what_the_blocks_add(network: PackedDiT, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 16, 16, generator=generator)
    timesteps, classes = [300 * i for i in range(rows)], range(rows)
    with torch.inference_mode():
        plain = network.forward(x, timesteps, classes)
        output, delta = network.forward_keeping(x, timesteps, classes, list(range(rows)))
        assert torch.equal(output, plain)
        assert torch.equal(network.forward_keeping(x, timesteps, classes, [rows - 1])[1], delta[-1:])
        assert delta.shape == (rows, network.config.num_tokens, network.config.hidden_size)
        assert_floats_agree(network.forward_reusing(x, timesteps, classes, delta), plain)


def test_a_step_between_stands_on_the_kept_delta(sampler: Sampler, network: PackedDiT) -> None:
    row = sampler.start(RowSpec(3, 8, 3, 1.0, "ddim", cache_interval=2))
    plain = sampler.start(RowSpec(3, 8, 3, 1.0, "ddim"))
    sampler.step([row, plain])
    assert torch.equal(row.x, plain.x)
    assert row.block_delta is not None
    assert not sampler.header.diffusion.clip_sample
    with torch.inference_mode():
        x = row.x[None]
        output = network.forward_reusing(x, [row.timestep], [3], row.block_delta)
    on_xt, on_output = row.coefficients[1][:2]
    sampler.step([row, plain])
    assert_floats_agree(row.previous_x0, (on_xt * x + on_output * output[:, :3])[0])
    assert not torch.equal(row.x, plain.x)


def test_a_delta_that_no_later_step_uses_is_dropped(sampler: Sampler) -> None:
    row, kept = sampler.start(RowSpec(3, 8, 6, 2.0, "ddim", cache_interval=2)), []
    while not row.done:
        sampler.step([row])
        kept.append(row.block_delta is not None)
    assert kept == [False, True, True, True, True, False]  # the second step runs the blocks again


@given(pairs=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 10)), min_size=1, max_size=5))
def test_the_final_layer_alone_is_what_the_table_holds(network: PackedDiT, pairs: list[tuple[int, int]]) -> None:
    timesteps, classes = zip(*pairs, strict=True)
    with torch.inference_mode():
        slots = network.conditioning.slots(timesteps, classes)
        held = network.conditioning.table[-2:, slots]
        assert torch.equal(network.conditioning.final(timesteps, classes), held)


def test_a_failed_step_can_be_repeated(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [RowSpec(i, i, 5, 2.0, "ddpm", cache_interval=1 + i) for i in range(3)]
    rows, smooth = [sampler.start(spec) for spec in specs], [sampler.start(spec) for spec in specs]
    sampler.finish(smooth)
    decline = iter([True, False] * 5)
    update = sampler._update

    def flaky(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if next(decline):
            raise MemoryError
        return update(*arguments)

    monkeypatch.setattr(sampler, "_update", flaky)
    for _ in range(5):
        with pytest.raises(MemoryError):
            sampler.step(rows)
        sampler.step(rows)
    assert all(torch.equal(row.x, other.x) for row, other in zip(rows, smooth, strict=True))


def test_a_network_that_is_not_packed_has_no_cache(sampler: Sampler) -> None:
    plain = Sampler(tiny_model(), sampler.header, checkpoint_name="plain", backend_name="torch", weight_bytes=0)
    with pytest.raises(ValueError, match="cache_interval must be 1"):
        plain.start(RowSpec(1, 0, 4, 1.0, "ddim", cache_interval=2))
