"""What bounds a batch: the rows of the model, memory that runs out, and a target for the time of a step."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from serving_harness import WAIT_S, WatchedSampler, outcome, running_engine, sample, spec, until

from robuq_core.images import encode_image
from server.fake import FakeRow


def model_rows(rows: Sequence[FakeRow]) -> int:
    return sum(2 if row.guided else 1 for row in rows)


class SmallCard(WatchedSampler):
    """Has memory for ``room`` rows of the model."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        return tuple(sorted({1 << i for i in range(max_rows.bit_length())} | {max_rows}))

    def step(self, rows: Sequence[FakeRow]) -> None:
        self.sizes.append(model_rows(rows))
        if self.sizes[-1] > self.room:
            raise MemoryError
        super().step(rows)


def test_when_memory_runs_out_every_request_completes_and_the_budget_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.stepping.GROW_AFTER", 8)
    card = SmallCard(room=64)
    with running_engine(card, max_batch_rows=16, max_queue_images=256) as engine:
        card.room = 5
        card.hold()
        specs = [spec(seed=s, steps=4, guidance_scale=1.0 + s % 2) for s in range(60)]
        jobs = [engine.submit(specs[:1], "png")]
        assert card.entered.acquire(timeout=WAIT_S)
        jobs += [engine.submit([later], "png") for later in specs[1:]]
        card.release()
        for of, job in zip(specs, jobs, strict=True):
            assert job.future.result(WAIT_S).images == (encode_image(card.decode(FakeRow(of)), "png"),)
        failures = [size for size in card.sizes if size > 5]
        assert len(failures) < 40  # it learns, rather than fail at every step
        # Half of what did not fit, or grown until the next step is to find that it does not.
        assert 3 <= engine.load().replicas[0].row_budget <= card.room + 1
        assert sample(engine, "robuq_requests_total", finished_reason="error") == 0
        card.room = 64
        card.step_s = 0.001  # for the pool to hear of the room in time
        card.sizes.clear()

        def runs_at_once() -> int:
            assert outcome(engine.submit([spec(seed=s, steps=200) for s in range(16)], "png")) is None
            return max(card.sizes)

        until(lambda: runs_at_once() == 16)


def test_a_warm_up_beyond_the_memory_serves_what_fits() -> None:
    card = SmallCard(room=7)
    with running_engine(card, max_batch_rows=32) as engine:
        assert max(card.sizes) == 8  # 16 and 32 were not even tried
        card.sizes.clear()
        assert outcome(engine.submit([spec(seed=s) for s in range(16)], "png")) is None
        assert max(card.sizes) == 4


@pytest.mark.parametrize(("target_s", "most"), [(None, 16), (0.021, 5), (0.0001, 2)])
def test_a_target_for_the_step_keeps_batches_small(target_s: float | None, most: int) -> None:
    """A step takes 4 ms a row here; an image of two rows runs even if it is above the target."""
    sampler = SmallCard(room=64)
    sampler.on_step = lambda rows: time.sleep(0.004 * model_rows(rows))
    with running_engine(sampler, max_batch_rows=16, max_queue_images=64, target_step_s=target_s) as engine:
        sampler.sizes.clear()
        assert outcome(engine.submit([spec(seed=s, steps=3, guidance_scale=2.0) for s in range(12)], "png")) is None
        assert max(sampler.sizes) <= most
        if target_s is None:
            assert max(sampler.sizes) == most
