"""What HTTP costs when the model costs nothing: overhead, ceiling; whether 100,000 requests leave a trace."""

from __future__ import annotations

import random
import time

import numpy as np

from bench.serving.client import Answer, Connection, closed_loop, run
from bench.serving.figures import Figure, Scale, require
from bench.serving.servers import NoOpSampler, Server, running
from loadtest.workload import Workload, gauges
from robuq_core.images import encode_image
from robuq_core.params import RowSpec
from server.fake import FakeRow

BODY = {"class_id": 1, "steps": 1, "guidance_scale": 1.0, "seed": 7}
SPEC = RowSpec(1, 7, 1, 1.0, NoOpSampler().defaults.sampler)


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _image_of(answer: Answer) -> bytes:
    require(answer.status == 200, f"status {answer.status}: {answer.content[:200]!r}")
    return answer.content


def overhead(scale: Scale) -> Figure:
    """Latency of a request less what the pool says it spent on the same request (``x-total-time``), alone."""
    rounds, count = scale.of(20, 4), scale.of(100, 50)
    answers: list[Answer] = []

    async def ask(url: str) -> list[Answer]:
        connection = await Connection.open(url)
        return [await connection.ask(BODY, accept="image/png") for _ in range(count)]

    with running("noop") as server:
        run(ask(server.url))  # warm
        for _ in range(rounds):
            answers += run(ask(server.url))
    pixels = NoOpSampler().decode(FakeRow(SPEC))
    expected = encode_image(pixels, "png")
    require(all(_image_of(answer) == expected for answer in answers), "HTTP's image is not the sampler's")
    http = [answer.seconds for answer in answers]
    extra = _milliseconds([answer.seconds - float(answer.header["x-total-time"]) for answer in answers])
    png = []
    for _ in range(count):
        began = time.perf_counter()
        encode_image(pixels, "png")
        png.append(time.perf_counter() - began)
    return Figure(
        "overhead",
        f"p50 {extra['p50_ms']:.2f} ms, p99 {extra['p99_ms']:.2f} ms",
        "p50 < 3 ms, p99 < 10 ms",
        extra["p50_ms"] < 3 and extra["p99_ms"] < 10,
        f"bytes of {len(answers)} images equal to the sampler's",
        {
            "overhead": extra,
            "http": _milliseconds(http),
            "png_alone": _milliseconds(png),
            "requests": len(answers),
        },
    )


def ceiling(scale: Scale) -> Figure:
    """Requests a second of a server in one process whose model takes no time."""
    users = 32
    with running("noop") as server:
        run(closed_loop(server.url, lambda: BODY, users=users, seconds=scale.of(3, 0.5), accept="image/png"))
        before, cpu_before = _completed(server), server.cpu_seconds()
        load = run(closed_loop(server.url, lambda: BODY, users=users, seconds=scale.of(15, 2), accept="image/png"))
        counted, cpu_s = _completed(server) - before, server.cpu_seconds() - cpu_before
    expected = encode_image(NoOpSampler().decode(FakeRow(SPEC)), "png")
    require(all(_image_of(answer) == expected for answer in load.answers), "an image is not the sampler's")
    require(counted == len(load.answers), f"the server counts {counted:g} images, the client {len(load.answers)}")
    latency = _milliseconds([answer.seconds for answer in load.answers])
    return Figure(
        "ceiling",
        f"{load.rate:,.0f} requests/s",
        "> 1,000 requests/s",
        load.rate > 1000,
        f"{len(load.answers):,} images equal to the sampler's, as many as the server counted",
        {
            "requests_per_s": load.rate,
            "users": users,
            "client_cpu_cores": load.client_cpu,
            "server_cpu_ms_per_request": cpu_s / counted * 1e3,
            **latency,
        },
    )


def _completed(server: Server) -> float:
    return gauges(server.metrics())["robuq_images_total"]


def leak(scale: Scale) -> Figure:
    """A hundred thousand requests to the real model, 30% cut off by their clients; what is left of them afterwards."""
    total, users = scale.of(100_000, 400), 32
    rng = random.Random(5)

    async def part(server: Server, count: int) -> tuple[int, int, list[Answer]]:
        workload = Workload(server.info(), (1, 2, 3, 4), max_images=2, rng=rng, fields=("seed", "guidance_scale"))
        load = await closed_loop(
            server.url,
            workload.several,
            users=users,
            requests=count,
            cut_off=0.3,
            patience_s=0.1,
            rng=random.Random(count),
        )
        return load.cut_off, len(load.answers), load.answers

    with running("continuous") as server:
        rss, descriptors = [], []
        cut_off = answered = 0
        for _ in range(5):
            cut, ok, answers = run(part(server, total // 5))
            require(all(answer.status == 200 for answer in answers), "a request was not served")
            cut_off, answered = cut_off + cut, answered + ok
            _wait_until_idle(server)
            rss.append(server.resident_bytes())
            descriptors.append(server.process.num_fds())
        found = gauges(server.metrics())
    left = found["robuq_requests_running"] + found["robuq_requests_waiting"]
    require(left == 0, f"{left:g} requests are still in the pool")
    require(abs(cut_off / (cut_off + answered) - 0.3) < 0.1, f"{cut_off} of {cut_off + answered} were cut off")
    growth = rss[-1] / rss[0] - 1
    steady = descriptors[-1] <= descriptors[0] + 2
    return Figure(
        "leak",
        f"gauges 0; RSS {growth:+.1%} from {total // 5:,} to {total:,} requests; descriptors "
        f"{descriptors[0]} then {descriptors[-1]}",
        "gauges 0, RSS within 3%",
        growth < 0.03 and steady,
        f"{cut_off:,} of {cut_off + answered:,} cut off; all others served",
        {"rss_bytes": rss, "descriptors": descriptors, "cut_off": cut_off, "answered": answered},
    )


def _wait_until_idle(server: Server) -> None:
    for _ in range(100):
        found = gauges(server.metrics())
        if found["robuq_requests_running"] + found["robuq_requests_waiting"] == 0:
            return
        time.sleep(0.1)
