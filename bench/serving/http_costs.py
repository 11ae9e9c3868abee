"""What HTTP costs when the model costs nothing: overhead, ceiling; whether 100,000 requests leave a trace."""

from __future__ import annotations

import random
import time

import numpy as np

from bench.serving.client import PNG, Answer, Connection, closed_loop, run
from bench.serving.figures import Figure, Scale, require
from bench.serving.servers import NoOpSampler, running
from loadtest.workload import Workload
from robuq_core.images import encode_image

BODY = {"class_id": 1, "steps": 1, "guidance_scale": 1.0, "seed": 7}


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _check_images(answers: list[Answer]) -> None:
    expected = encode_image(NoOpSampler().decode(None), "png")
    require(all(answer.content == expected for answer in answers), "an image is not the sampler's")


def overhead(scale: Scale) -> Figure:
    """Latency of a request less what the pool says it spent on the same request (``x-total-time``), alone."""

    async def ask(url: str, count: int) -> list[Answer]:
        connection = await Connection.open(url)
        return [await connection.ask(BODY, PNG) for _ in range(count)]

    with running("noop") as server:
        run(ask(server.url, 100))  # warm
        answers = run(ask(server.url, scale.of(2000, 200)))
    _check_images(answers)
    extra = _milliseconds([answer.seconds - float(answer.header["x-total-time"]) for answer in answers])
    return Figure(
        "overhead",
        f"p50 {extra['p50_ms']:.2f} ms, p99 {extra['p99_ms']:.2f} ms",
        "p50 < 3 ms, p99 < 10 ms",
        extra["p50_ms"] < 3 and extra["p99_ms"] < 10,
        f"bytes of {len(answers)} images equal to the sampler's",
        {"overhead": extra, "http": _milliseconds([answer.seconds for answer in answers])},
    )


def ceiling(scale: Scale) -> Figure:
    """Requests a second of a server in one process whose model takes no time."""
    users = 32
    with running("noop") as server:
        run(closed_loop(server.url, lambda: BODY, users=users, seconds=scale.of(3, 0.5), accept=PNG))
        before, cpu_before = server.gauges()["robuq_images_total"], server.cpu_seconds()
        load = run(closed_loop(server.url, lambda: BODY, users=users, seconds=scale.of(15, 2), accept=PNG))
        counted, cpu_s = server.gauges()["robuq_images_total"] - before, server.cpu_seconds() - cpu_before
    _check_images(load.answers)
    require(counted == len(load.answers), f"the server counts {counted:g} images, the client {len(load.answers)}")
    return Figure(
        "ceiling",
        f"{load.rate:,.0f} requests/s",
        "> 1,000 requests/s",
        load.rate > 1000,
        f"{len(load.answers):,} images equal to the sampler's, as many as the server counted",
        {
            "requests_per_s": load.rate,
            "users": users,
            "server_cpu_ms_per_request": cpu_s / counted * 1e3,
            **_milliseconds([answer.seconds for answer in load.answers]),
        },
    )


def leak(scale: Scale) -> Figure:
    """A hundred thousand requests to the real model, 30% cut off by their clients; what is left of them afterwards."""
    total, rng = scale.of(100_000, 400), random.Random(5)
    rss, descriptors, cut_off, answered = [], [], 0, 0
    with running("continuous") as server:
        workload = Workload(server.info(), (1, 2, 3, 4), max_images=2, rng=rng, fields=("seed", "guidance_scale"))
        for _ in range(5):
            load = run(closed_loop(server.url, workload.several, users=32, requests=total // 5, cut_off=0.3))
            require(load.all_served, "a request was not served")
            cut_off, answered = cut_off + load.cut_off, answered + len(load.answers)
            deadline = time.monotonic() + 10
            while (left := server.requests_left()) and time.monotonic() < deadline:
                time.sleep(0.1)
            require(not left, f"{left:g} requests are still in the pool")
            rss.append(server.resident_bytes())
            descriptors.append(server.process.num_fds())
    require(abs(cut_off / (cut_off + answered) - 0.3) < 0.1, f"{cut_off} of {cut_off + answered} were cut off")
    growth = rss[-1] / rss[0] - 1
    return Figure(
        "leak",
        f"gauges 0; RSS {growth:+.1%} from {total // 5:,} to {total:,} requests; descriptors "
        f"{descriptors[0]} then {descriptors[-1]}",
        "gauges 0, RSS within 3%",
        growth < 0.03 and descriptors[-1] <= descriptors[0] + 2,
        f"{cut_off:,} of {cut_off + answered:,} cut off; all others served",
        {"rss_bytes": rss, "descriptors": descriptors, "cut_off": cut_off, "answered": answered},
    )
