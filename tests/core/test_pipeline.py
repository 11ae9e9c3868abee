from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from robuq_core.config import DIFFUSION_SAMPLERS
from robuq_core.pipeline import Row, RowSpec, Sampler

SPECS = st.builds(
    RowSpec,
    class_id=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 6),
    guidance_scale=st.sampled_from([0.0, 1.0, 1.5, 4.0]),
    sampler=st.sampled_from(DIFFUSION_SAMPLERS),
    guidance_interval=st.sampled_from([(0, 999), (300, 800), (999, 999), (0, 0)]),
    cache_interval=st.integers(1, 4),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def sampler(path: Path) -> Sampler:
    return Sampler.from_checkpoint(path)


def _draw_alone(sampler: Sampler, spec: RowSpec) -> Row:
    row = sampler.start(spec)
    while not row.done:
        sampler.step([row])
    return row


def _draw_together(sampler: Sampler, specs: list[RowSpec], delays: list[int]) -> list[Row]:
    """Rows join after their delay and leave when done, as a server would have it."""
    rows: list[Row | None] = [None] * len(specs)
    tick = 0
    while any(row is None or not row.done for row in rows):
        for i, delay in enumerate(delays):
            if rows[i] is None and tick >= delay:
                rows[i] = sampler.start(specs[i])
        running = [row for row in rows if row is not None and not row.done]
        if running:
            sampler.step(running)
        tick += 1
    return [row for row in rows if row is not None]


@settings(max_examples=8)
@given(specs=st.lists(SPECS, min_size=2, max_size=33), data=st.data())
def test_a_picture_does_not_depend_on_its_neighbours(
    sampler: Sampler, path: Path, specs: list[RowSpec], data: st.DataObject
) -> None:
    delays = data.draw(st.lists(st.integers(0, 4), min_size=len(specs), max_size=len(specs)))
    together = _draw_together(sampler, specs, delays)
    # Nor on what the sampler drew before, or on its number of threads.
    fresh = Sampler.from_checkpoint(path, threads=data.draw(st.integers(1, 3)))
    for spec, row in list(zip(specs, together, strict=True))[:4]:
        assert torch.equal(_draw_alone(fresh, spec).x, row.x)


def test_seed_steps_guidance_and_class_all_matter(sampler: Sampler) -> None:
    base = RowSpec(1, 0, 4, 2.0, "ddim")
    reference = sampler.decode(_draw_alone(sampler, base))
    assert np.array_equal(sampler.decode(_draw_alone(sampler, base)), reference)
    for other in (
        RowSpec(2, 0, 4, 2.0, "ddim"),
        RowSpec(1, 1, 4, 2.0, "ddim"),
        RowSpec(1, 0, 5, 2.0, "ddim"),
        RowSpec(1, 0, 4, 3.0, "ddim"),
        RowSpec(1, 0, 4, 2.0, "ddpm"),
        RowSpec(1, 0, 4, 2.0, "ddim", (0, 500)),
        RowSpec(1, 0, 4, 2.0, "ddim", cache_interval=2),
    ):
        assert not np.array_equal(sampler.decode(_draw_alone(sampler, other)), reference)


def test_guidance_outside_of_its_interval_costs_nothing(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = sampler.model.forward

    def counted(x: torch.Tensor, timesteps: list[float], classes: list[int]) -> torch.Tensor:
        sizes.append(len(x))
        return forward(x, timesteps, classes)

    monkeypatch.setattr(sampler.model, "forward", counted)
    row = _draw_alone(sampler, RowSpec(1, 0, 4, 2.0, "ddim", (333, 800)))
    assert list(row.table.timesteps) == [999, 666, 333, 0]
    assert sizes == [1, 2, 2, 1]


def test_generate_gives_pictures_and_counts_seeds_up(sampler: Sampler) -> None:
    steps: list[int] = []
    images = sampler.generate([3, 3], seed=7, on_step=lambda: steps.append(1))
    assert len(steps) == sampler.defaults.steps
    assert [image.size for image in images] == [(16, 16)] * 2
    assert np.array_equal(np.asarray(images[1]), np.asarray(sampler.generate([3], seed=8)[0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RowSpec(10, 0, 4, 1.0, "ddim"), r"class_id must be 0\.\.9"),
        (RowSpec(-1, 0, 4, 1.0, "ddim"), "class_id"),
        (RowSpec(1, 2**32, 4, 1.0, "ddim"), "seed must be"),
        (RowSpec(1, 0, 0, 1.0, "ddim"), "steps must be"),
        (RowSpec(1, 0, 4, 1.0, "ddim", (500, 400)), "guidance_interval"),
        (RowSpec(1, 0, 4, 1.0, "ddim", (0, 1000)), "guidance_interval"),
        (RowSpec(1, 0, 4, 1.0, "ddim", cache_interval=0), "cache_interval"),
    ],
)
def test_requests_out_of_range_are_refused(sampler: Sampler, spec: RowSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.start(spec)


def test_classes_by_name_are_those_by_id(sampler: Sampler) -> None:
    by_name = sampler.generate(["class 3", "CLASS_7"], seed=1, steps=2)
    assert by_name == sampler.generate([3, 7], seed=1, steps=2)
    with pytest.raises(ValueError, match=r"'class 10' is not a class of this checkpoint; .* 0\.\.9"):
        sampler.generate(["class 10"])
    with pytest.raises(ValueError, match=r"class_ids must be a list: \['class 3'\], not 'class 3'"):
        sampler.generate("class 3")


def test_a_row_may_start_from_noise_of_its_own(sampler: Sampler) -> None:
    spec = RowSpec(1, 5, 3, 1.5, "ddpm")
    expected = _draw_alone(sampler, spec)
    same = sampler.start(spec, torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5)))
    other = sampler.start(spec, torch.zeros(3, 16, 16))
    sampler.finish([same, other])
    assert torch.equal(same.x, expected.x)
    assert not torch.equal(other.x, expected.x)


def test_estimates_are_snapshots_that_end_in_the_picture(sampler: Sampler) -> None:
    row = sampler.start(RowSpec(1, 5, 3, 1.5, "ddim"))
    assert np.array_equal(sampler.decode_estimate(sampler.estimate(row)), np.full((16, 16, 3), 128, np.uint8))
    sampler.step([row])
    first = sampler.estimate(row)
    pixels = sampler.decode_estimate(first)
    while not row.done:
        sampler.step([row])
    assert np.array_equal(sampler.decode_estimate(first), pixels)
    # The last DDIM step lands on the estimate itself.
    assert np.array_equal(sampler.decode_estimate(sampler.estimate(row)), sampler.decode(row))


@given(max_rows=st.integers(1, 300))
def test_warm_up_covers_one_row_and_the_most(sampler: Sampler, max_rows: int) -> None:
    sizes = sampler.warm_up_rows(max_rows)
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert all(small < large <= 2 * small for small, large in pairwise(sizes))


def test_a_device_that_the_backend_lacks_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="cpu backend does not run on cuda:1"):
        Sampler.from_checkpoint(path, backend="cpu", device="cuda:1")


def test_a_failing_forward_moves_no_row(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    row = sampler.start(RowSpec(1, 0, 4, 1.0, "ddpm"))
    before = row.x.clone()

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampler.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.step([row])
    assert row.steps_done == 0
    assert torch.equal(row.x, before)
