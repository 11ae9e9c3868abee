"""Mutated requests against a server process: of 5xx only 501 and 503, flat memory, probes answered, nothing left."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import httpx
import psutil
import pytest
from http_fuzzer import mutated, send_all
from process_harness import serving
from serving_harness import WAIT_S, until
from test_connection_limits import probe

MIB = 2**20
HEALTH_S = 10.0  # an idle machine takes milliseconds
WAIT_FOR_ANSWER_S = 2.0  # some mutants are half a request, for whose rest the server waits


class Prober(threading.Thread):
    """Asks /health on new connections until it is stopped; remembers the slowest answer and what was not 200."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.slowest_s, self.answers, self.wrong = 0.0, 0, 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            began = time.monotonic()
            good = probe(self.client) == 200
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1
            self.wrong += not good


@pytest.mark.parametrize(("requests", "seed"), [(400, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_mutated_requests(requests: int, seed: int) -> None:
    rng = random.Random(seed)
    with serving(change="sampler.step_s = 0.0") as (process, client):
        address = (client.base_url.host, client.base_url.port or 80)
        memory = psutil.Process(process.pid).memory_info
        # What is allocated once, such as for the first image of each kind, is no leak.
        asyncio.run(send_all(address, [mutated(rng) for _ in range(200)], seed, WAIT_FOR_ANSWER_S))
        before = memory().rss
        prober = Prober(client)
        prober.start()
        statuses = asyncio.run(send_all(address, [mutated(rng) for _ in range(requests)], seed, WAIT_FOR_ANSWER_S))
        prober.ended.set()
        prober.join(WAIT_S)
        grown = (memory().rss - before) / MIB
        print(f"{dict(statuses)}; {grown:.1f} MiB; slowest of {prober.answers} probes {prober.slowest_s * 1e3:.0f} ms")
        assert {status for status in statuses if status >= 500} <= {501, 503}  # 501: a Transfer-Encoding
        # The mutations leave some right, make some no HTTP, and reach the routes with others.
        assert min(statuses[200], statuses[400], statuses[422]) > requests / 100
        assert grown < 32
        assert prober.answers > 0
        assert prober.wrong == 0
        assert prober.slowest_s < HEALTH_S
        until(lambda: client.get("/queue").json()["images_in_flight"] == 0, every_s=0.05)
        assert client.post("/generate", json={"class_id": 1}).status_code == 200
        assert process.poll() is None
        assert not [line for line in process.output.splitlines() if '"exception"' in line]
        assert not process.error_output
