"""How much of the raw model the server delivers: efficiency, step tax, occupancy; and that company changes no pixel."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from statistics import median
from typing import Any

import torch

from bench.serving.client import Load, closed_loop, run
from bench.serving.figures import Figure, Scale, require
from bench.serving.servers import MAX_ROWS, bench_settings, checkpoint, running
from loadtest.workload import Workload, gauges
from robuq_core.config import rows_of, samplers_of
from robuq_core.images import encode_image
from robuq_core.params import RowSpec
from robuq_core.pipeline import Sampler
from server.metrics import Metrics
from server.pool import Pool
from server.request import Request


def _default_specs(sampler: Sampler, images: int, steps: int | None = None) -> list[RowSpec]:
    defaults = sampler.defaults
    return [
        RowSpec(i % sampler.valid_classes, i, steps or defaults.steps, defaults.guidance_scale, defaults.sampler)
        for i in range(images)
    ]


def _full_batch(sampler: Sampler) -> int:
    return MAX_ROWS // rows_of(sampler.defaults.guidance_scale)


def _raw_images(sampler: Sampler, images: int) -> tuple[float, list[bytes]]:
    """Images a second of the bare model at a full batch, and the images."""
    began = time.perf_counter()
    rows = [sampler.start(spec) for spec in _default_specs(sampler, images)]
    while not rows[0].done:
        sampler.step(rows)
    pixels = [sampler.decode(row) for row in rows]
    seconds = time.perf_counter() - began
    return images / seconds, [encode_image(each, "png") for each in pixels]


def efficiency(scale: Scale) -> Figure:
    """Images a second over HTTP with as many users as a batch holds images, against the bare model at that batch."""
    sampler = Sampler.from_checkpoint(checkpoint())
    images = _full_batch(sampler)
    rounds, seconds = scale.of(5, 1), scale.of(12, 3)
    raw, served = [], []
    numbers = iter(range(10**9))

    def body() -> dict[str, Any]:
        number = next(numbers) % images  # the same images as the bare model's, again and again
        named = {"class_id": number % sampler.num_classes} if sampler.num_classes else {}
        return named | {"seed": number}

    _raw_images(sampler, images)
    with running("continuous") as server:
        run(closed_loop(server.url, body, users=images, seconds=2))
        for _ in range(rounds):  # in turn, so that both meet the same machine; the idle one takes nothing
            rates = [_raw_images(sampler, images) for _ in range(scale.of(3, 1))]
            raw.append(median(rate for rate, _ in rates))
            expected = rates[0][1]
            load = run(closed_loop(server.url, body, users=images, seconds=seconds))
            served.append(load.rate)
            _check_images(load, expected)
    ratios = [a / b for a, b in zip(served, raw, strict=True)]
    ratio = median(ratios)
    return Figure(
        "efficiency",
        f"{ratio:.3f} (served {median(served):.1f}, raw {median(raw):.1f} images/s at batch {images})",
        ">= 0.95",
        ratio >= 0.95,
        "every served image equal to the bare model's of the same seed",
        {"ratios": ratios, "served_images_per_s": served, "raw_images_per_s": raw, "images": images},
    )


def _check_images(load: Load, expected: list[bytes]) -> None:
    require(load.all_served, "a request was not served")
    for answer in load.answers:
        content = json.loads(answer.content)
        image = base64.b64decode(content["images"][0])
        require(image == expected[content["seed"]], f"seed {content['seed']}: not the bare model's image")


@asynccontextmanager
async def _local_pool() -> AsyncIterator[Pool]:
    """One real worker, warm, without HTTP."""
    pool = Pool(bench_settings(), Metrics(MAX_ROWS))
    await pool.start()
    while pool.status == "starting":
        await asyncio.sleep(0.01)
    try:
        yield pool
    finally:
        await pool.stop()


def _submit(pool: Pool, *specs: RowSpec) -> Request:
    return pool.submit(Request(pool.model, specs))


def step_tax(scale: Scale) -> Figure:
    """Seconds of a step of a full batch in a worker against the bare forward of the network alone."""
    sampler = Sampler.from_checkpoint(checkpoint())
    steps, rounds = 12, scale.of(60, 4)  # many short turns: both sides meet the same machine
    specs = _default_specs(sampler, _full_batch(sampler), steps)
    served, raw, forward = [], [], []

    async def measured() -> None:
        async with _local_pool() as pool:
            for _ in range(rounds):
                result = await _submit(pool, *specs).future
                served.append(result.timings.inference_s / steps)
                rows = [sampler.start(spec) for spec in specs]
                with _timed_forwards(sampler) as forwards:
                    began = time.perf_counter()
                    while not rows[0].done:
                        sampler.step(rows)
                    raw.append((time.perf_counter() - began) / steps)
                forward.append(sum(forwards) / steps)
                images_alone = [encode_image(sampler.decode(row), "png") for row in rows]
                require(list(result.images) == images_alone, "the worker's images are not the bare model's")

    run(measured())
    tax, worker_tax = median(served) / median(forward) - 1, median(served) / median(raw) - 1
    return Figure(
        "step tax",
        f"{tax:+.1%} over the network's forward ({median(forward) * 1e3:.1f} ms at {MAX_ROWS} rows); "
        f"{worker_tax:+.1%} over the sampler's step",
        "<= 5%",
        tax <= 0.05,
        "images equal to the bare model's",
        {"served_step_s": served, "sampler_step_s": raw, "forward_s": forward, "tax": tax, "worker_tax": worker_tax},
    )


@contextmanager
def _timed_forwards(sampler: Sampler) -> Iterator[list[float]]:
    seconds: list[float] = []
    forward = sampler.model.forward

    def timed(*inputs: Any) -> torch.Tensor:
        began = time.perf_counter()
        output: torch.Tensor = forward(*inputs)
        seconds.append(time.perf_counter() - began)
        return output

    sampler.model.forward = timed
    try:
        yield seconds
    finally:
        sampler.model.forward = forward


def occupancy(scale: Scale) -> Figure:
    """Rows used of those there were, by the server's own counters, with three batches' worth of users."""
    seconds = scale.of(30, 6)
    with running("continuous") as server:
        workload = Workload(server.info(), (4, 10, 20, 50), rng=random.Random(3), fields=("sampler", "guidance_scale"))

        async def measured() -> tuple[dict[str, float], dict[str, float], Load]:
            loop = asyncio.create_task(closed_loop(server.url, workload.mixed, users=3 * MAX_ROWS, seconds=seconds))
            await asyncio.sleep(seconds * 0.2)  # past the ramp, and before the last requests go
            before = await asyncio.to_thread(server.gauges)
            await asyncio.sleep(seconds * 0.7)
            return before, await asyncio.to_thread(server.gauges), await loop

        before, after, load = run(measured())
    steps = after["robuq_engine_steps_total"] - before["robuq_engine_steps_total"]
    rows = after["robuq_batch_rows_sum"] - before["robuq_batch_rows_sum"]
    require(steps > 10, f"only {steps:g} steps in the measured time")
    require(load.all_served, "a request was not served")
    share = rows / (steps * MAX_ROWS)
    return Figure(
        "occupancy",
        f"{share:.3f} over {steps:.0f} steps of {MAX_ROWS} rows",
        ">= 0.98",
        share >= 0.98,
        f"{len(load.answers):,} requests of mixed steps, samplers and guidance all served",
        {"share": share, "steps": steps, "rows": rows, "max_rows": MAX_ROWS},
    )


def invariance(scale: Scale) -> Figure:
    """Pixels of a request alone against those among random others that come, go and are cut off."""
    batches, rng = scale.of(200, 10), random.Random(11)
    sampler = Sampler.from_checkpoint(checkpoint())
    samplers = samplers_of(sampler.prediction_type)
    scales = (1.0, 1.5, 4.0) if sampler.can_guide else (1.0,)

    def random_spec() -> RowSpec:
        return RowSpec(
            rng.randrange(sampler.valid_classes),
            rng.randrange(2**32),
            rng.randint(2, 12),
            rng.choice(scales),
            rng.choice(samplers),
        )

    equal, batch_rows = 0, []

    async def measured() -> None:
        nonlocal equal
        async with _local_pool() as pool:
            for _ in range(batches):
                target = random_spec()
                alone = (await _submit(pool, target).future).images
                before = gauges(pool.metrics.render().decode())
                others = [random_spec() for _ in range(rng.randint(1, MAX_ROWS))]
                ahead = rng.randint(0, len(others))
                requests = [_submit(pool, spec) for spec in others[:ahead]]
                await asyncio.sleep(rng.random() * 0.05)  # so that it joins rows that are at any step
                joined = _submit(pool, target)
                requests += [_submit(pool, spec) for spec in others[ahead:]]
                equal += (await joined.future).images == alone
                after = gauges(pool.metrics.render().decode())
                for other in requests:
                    other.cancel()
                steps = after["robuq_engine_steps_total"] - before["robuq_engine_steps_total"]
                batch_rows.append((after["robuq_batch_rows_sum"] - before["robuq_batch_rows_sum"]) / steps)

    run(measured())
    company = sum(batch_rows) / len(batch_rows)
    require(company > 4, f"batches of {company:.1f} rows are no company")
    return Figure(
        "invariance",
        f"{equal} of {batches} equal",
        "100%",
        equal == batches,
        f"bytes of the files; {company:.1f} rows a batch on average, up to {MAX_ROWS}",
        {"equal": equal, "batches": batches, "mean_rows": batch_rows},
    )
