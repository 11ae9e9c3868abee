"""The bundled model in the pool: an image is the same alone and in any company, watched or not, on any replica."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from serving_harness import Engine, outcome, running_engine

from robuq_core.config import DIFFUSION_SAMPLERS
from robuq_core.params import RowSpec
from robuq_core.pipeline import Sampler
from server.request import Cancelled, Event

CROWD = 24


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    first = Sampler.from_checkpoint(threads=1)
    samplers = (first, first.replica(threads=1))
    with running_engine(*samplers, max_batch_rows=12, max_queue_images=256) as engine:
        yield engine


def random_spec(rng: random.Random, sampler: str, classes: int) -> RowSpec:
    return RowSpec(
        class_id=rng.randrange(classes),
        seed=rng.randrange(2**32),
        steps=rng.randint(1, 8),
        guidance_scale=rng.choice([0.0, 1.0, 1.5, 4.0]),
        sampler=sampler,  # type: ignore[arg-type]
        cache_interval=rng.choice([1, 1, 2, 3]),
    )


def draw(engine: Engine, spec: RowSpec) -> bytes:
    return engine.submit([spec], "png").future.result(120).images[0]


def test_alone_and_in_a_watched_and_mixed_crowd(engine: Engine) -> None:
    rng = random.Random(11)
    wanted = [random_spec(rng, sampler, engine.model.num_classes) for sampler in DIFFUSION_SAMPLERS]
    alone = [draw(engine, spec) for spec in wanted]
    heard: list[Event] = []
    for turn in range(3):
        crowd = [random_spec(rng, rng.choice(DIFFUSION_SAMPLERS), engine.model.num_classes) for _ in range(CROWD)]
        jobs = [
            engine.submit([spec], "png", preview_every=1 + i % 3, on_event=heard.append if i % 2 else None)
            for i, spec in enumerate([*crowd, *wanted])
        ]
        # Some leave before they are done, which changes the batch of those who stay.
        for job in jobs[turn:CROWD:5]:
            engine.cancel(job)
        assert [job.future.result(120).images[0] for job in jobs[CROWD:]] == alone
        assert {type(outcome(job)) for job in jobs[:CROWD]} <= {type(None), Cancelled}
    assert any(event.preview for event in heard)


def test_images_of_one_request_are_those_of_single_requests(engine: Engine) -> None:
    rng = random.Random(12)
    specs = [random_spec(rng, rng.choice(DIFFUSION_SAMPLERS), engine.model.num_classes) for _ in range(10)]
    together = engine.submit(specs, "png").future.result(120).images
    assert list(together) == [draw(engine, spec) for spec in specs]
