"""Load on a running server, in one of several scenarios.

    robuq-serve &
    locust -f loadtest --host http://127.0.0.1:8000                            # with its page on port 8089
    locust -f loadtest --host http://127.0.0.1:8000 --headless -u 16 -t 60s --scenario burst

Every answer is checked: images decode and have the model's size, values that were sent come back. A 429 is counted
under its own name, not as a failure, and the user waits as long as Retry-After says. When the test ends, the server
must be idle within a few seconds, even if clients disconnected. Locust is closed-loop: a slow server slows its users
down, so latencies under overload look better than independent clients would see; ``python -m loadtest.open_loop``
reports those.
"""

from __future__ import annotations

import logging
import random
import socket
import urllib.request
from argparse import ArgumentParser
from typing import Any

import gevent
from locust import HttpUser, LoadTestShape, between, events, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError, Timeout
from urllib3.exceptions import ReadTimeoutError

from loadtest.open_loop import TARGET_S
from loadtest.workload import FORMATS, SCENARIOS, Workload, check_image, gauges, users_at

logger = logging.getLogger("loadtest")

READY_TIMEOUT_S, IDLE_TIMEOUT_S = 60, 15
# The slow reader takes this many bytes at a time, and rests.
SLOW_BYTES, SLOW_REST_S = 512, 0.02

# Latencies of the requests for images, infinite if not served.
latencies_ms: list[float] = []


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Options of the mix, shown on locust's page too."""
    about = "; ".join(f"{name}: {text}" for name, (text, _) in SCENARIOS.items())
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="mixed", help=about)
    parser.add_argument("--steps", default="4,10,20,50", help="step counts to choose from, comma-separated")
    parser.add_argument("--target", type=float, default=TARGET_S, help="seconds within which an answer is good")
    parser.add_argument("--max-images", type=int, default=4, help="most images in one request, at most 16")


def fail(environment: Environment, message: str) -> None:
    environment.process_exit_code = 1
    raise RuntimeError(message)


@events.test_start.add_listener
def wait_until_ready(environment: Environment, **_: Any) -> None:
    """A server that was started a moment ago is given time to load and warm up."""
    latencies_ms.clear()
    for _attempt in range(READY_TIMEOUT_S):
        try:
            with urllib.request.urlopen(f"{environment.host}/ready", timeout=5):
                if environment.shape_class is not None:
                    environment.shape_class.reset_time()
                return
        except OSError:  # not listening yet, or 503
            gevent.sleep(1)
    fail(environment, f"{environment.host}/ready is not green after {READY_TIMEOUT_S} s")


@events.request.add_listener
def keep_latency(name: str, response_time: float, exception: Exception | None, **_: Any) -> None:
    if name.startswith("/generate") and not name.endswith("(left)"):
        served = exception is None and not name.endswith("(429 queue full)")
        latencies_ms.append(response_time if served else float("inf"))


@events.test_stop.add_listener
def finish(environment: Environment, **_: Any) -> None:
    """Report goodput; requests whose users are gone must leave the engine."""
    if latencies_ms:
        target = environment.parsed_options.target
        share = sum(each <= 1e3 * target for each in latencies_ms) / len(latencies_ms)
        logger.info("goodput: %.1f%% of %d within %g s", 100 * share, len(latencies_ms), target)
    left = float("nan")
    for _attempt in range(2 * IDLE_TIMEOUT_S):
        try:
            with urllib.request.urlopen(f"{environment.host}/metrics", timeout=5) as answer:
                found = gauges(answer.read().decode())
        except OSError:
            break
        left = found["robuq_requests_running"] + found["robuq_requests_waiting"]
        if left == 0:
            return
        gevent.sleep(0.5)
    fail(environment, f"{left:g} requests are still in the engine {IDLE_TIMEOUT_S} s after the last user has gone")


class ScenarioShape(LoadTestShape):
    """The users of ``--scenario``, out of ``--users``, for ``--run-time``."""

    use_common_options = True

    def tick(self) -> tuple[int, float, list[type[Any]]] | None:
        options = self.runner.environment.parsed_options  # type: ignore[union-attr]
        count = users_at(options.scenario, self.get_run_time(), options.num_users or 1, options.run_time)
        if count is None:
            return None
        return count, options.spawn_rate or 1, [globals()[name] for name in SCENARIOS[options.scenario][1]]


class Guest(HttpUser):
    abstract = True
    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        steps = [int(count) for count in options.steps.split(",")]
        self.workload = Workload(self.client.get("/info").json(), steps, options.max_images)

    def post(self, body: dict[str, Any], name: str = "/generate", **options: Any) -> Any:
        """A context with the answer, in which the test decides whether it was good."""
        return self.client.post("/generate", json=body, name=name, catch_response=True, **options)

    def check(self, body: dict[str, Any], answer: ResponseContextManager, image_format: str | None = None) -> None:
        """Fail a bad answer; count a 429 apart and obey its Retry-After. ``image_format``: of a raw answer."""
        if answer.status_code == 429:
            answer.request_meta["name"] += " (429 queue full)"
            answer.success()
            gevent.sleep(float(answer.headers.get("Retry-After", 1)))
        elif answer.status_code != 200:
            answer.failure(f"status {answer.status_code}: {(answer.text or '')[:200]}")
        else:
            try:
                if image_format is None:
                    self.workload.check(body, answer.json())
                else:
                    check_image(answer.content or b"", image_format, self.workload.info["image_size"])
                    if answer.headers["X-Seed"] != str(body.get("seed", answer.headers["X-Seed"])):
                        raise ValueError("X-Seed is not the seed that was sent")
            except (KeyError, ValueError, OSError) as error:
                answer.failure(f"bad answer: {error!r}")


class PlainUser(Guest):
    """Asks for one image after the other, all by default."""

    @task
    def generate(self) -> None:
        body = self.workload.plain()
        with self.post(body) as answer:
            self.check(body, answer)


class ImageUser(Guest):
    """Somebody who looks at images: asks, waits for the answer, looks, asks again."""

    weight = 2

    @task(6)
    def generate_json(self) -> None:
        body = self.workload.several()
        with self.post(body) as answer:
            self.check(body, answer)

    @task(3)
    def generate_raw(self) -> None:
        body, image_format = self.workload.mixed(), random.choice(FORMATS)
        with self.post(body, "/generate raw", headers={"Accept": f"image/{image_format}"}) as answer:
            self.check(body, answer, image_format)

    @task(1)
    def probe(self) -> None:
        self.client.get(random.choice(("/health", "/ready", "/metrics")), name="probes")


class SmallWindow(HTTPAdapter):
    """Connections that hold little unread data, so that the rest stays with the server."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])


class SlowReader(Guest):
    """Reads the answer a few bytes at a time; others must not notice."""

    def on_start(self) -> None:
        super().on_start()
        self.client.mount("http://", SmallWindow())

    @task
    def generate_slowly(self) -> None:
        body = self.workload.several() | {"num_images": self.workload.max_images}
        with self.post(body, "/generate read slowly", stream=True) as answer:
            pieces = bytearray()
            for piece in answer.iter_content(SLOW_BYTES):
                pieces += piece
                gevent.sleep(SLOW_REST_S)
            answer._content = bytes(pieces)  # where requests keeps what was read
            self.check(body, answer)


class Leaver(Guest):
    """Disconnects after a while, with or without an answer."""

    @task
    def generate_and_leave(self) -> None:
        body = self.workload.several()
        with self.post(body, timeout=random.uniform(0.005, 0.5)) as answer:
            error = answer.error
            # Within the body requests wraps the timeout in another error.
            within = isinstance(error, ConnectionError) and any(isinstance(e, ReadTimeoutError) for e in error.args)
            if within or isinstance(error, Timeout):  # the connection is closed now
                answer.request_meta["name"] += " (left)"
                answer.success()
            else:
                self.check(body, answer)
