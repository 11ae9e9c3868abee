"""Load on a running server, in one of several scenarios.

    robuq-serve &
    locust -f loadtest --host http://127.0.0.1:8000                            # with its page on port 8089
    locust -f loadtest --host http://127.0.0.1:8000 --headless -u 16 -t 60s --scenario burst

Every answer is checked: images decode and have the model's size, values that were sent come back. A 429 is counted
under its own name, not as a failure, and the user waits as long as Retry-After says. When the test ends, the server
must be idle within a few seconds, even if clients disconnected. ``--tags json``, ``raw`` and ``probe`` narrow the mix.
Locust is closed-loop: a slow server slows its users down, so what it reports under overload are not the waits that
independent clients would see; ``python -m loadtest.open_loop`` reports those.
"""

from __future__ import annotations

import logging
import random
import socket
import urllib.request
from argparse import ArgumentParser
from collections import Counter
from typing import Any

import gevent
from locust import HttpUser, LoadTestShape, between, events, tag, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError, Timeout
from urllib3.exceptions import ReadTimeoutError

from loadtest.open_loop import TARGET_S
from loadtest.workload import FORMATS, SCENARIOS, Workload, check_image, gauges, users_at

logger = logging.getLogger("loadtest")

READY_TIMEOUT_S = 60
IDLE_TIMEOUT_S = 15
# The slow reader takes this many bytes at a time, and rests.
SLOW_BYTES = 512
SLOW_REST_S = 0.02

# Requests for images: all, and those served within --target.
goodput: Counter[str] = Counter()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Options of the mix, shown on locust's page too."""
    about = "; ".join(f"{name}: {scenario.about}" for name, scenario in SCENARIOS.items())
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="mixed", help=about)
    parser.add_argument("--steps", default="4,10,20,50", help="step counts to choose from, comma-separated")
    parser.add_argument("--target", type=float, default=TARGET_S, help="seconds within which an answer is good")
    parser.add_argument("--max-images", type=int, default=4, help="most images in one request, at most 16")


@events.test_start.add_listener
def wait_until_ready(environment: Environment, **_: Any) -> None:
    """A server that was started a moment ago is given time to load and warm up."""
    for _attempt in range(READY_TIMEOUT_S):
        try:
            with urllib.request.urlopen(f"{environment.host}/ready", timeout=5):
                if environment.shape_class is not None:
                    environment.shape_class.reset_time()
                return
        except OSError:  # not listening yet, or 503
            gevent.sleep(1)
    environment.process_exit_code = 1
    raise RuntimeError(f"{environment.host}/ready is not green after {READY_TIMEOUT_S} s")


@events.init.add_listener
def watch_goodput(environment: Environment, **_: Any) -> None:
    """Count requests for images, and those served within ``--target``: the goodput, reported at the end."""
    options = environment.parsed_options

    @events.request.add_listener
    def count(name: str, response_time: float, exception: Exception | None, **_: Any) -> None:
        if name.startswith("/generate") and not name.endswith("(left)"):
            served = exception is None and not name.endswith("(429 queue full)")
            goodput["all"] += 1
            goodput["good"] += served and options is not None and response_time <= 1e3 * options.target

    @events.test_stop.add_listener
    def report(**_: Any) -> None:
        if goodput["all"] and options is not None:
            share = goodput["good"] / goodput["all"]
            logger.info("goodput: %.1f%% of %d within %g s", 100 * share, goodput["all"], options.target)
        goodput.clear()


@events.test_stop.add_listener
def nothing_is_left_running(environment: Environment, **_: Any) -> None:
    """Requests whose users are gone must leave the engine."""
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
    environment.process_exit_code = 1
    raise RuntimeError(f"{left:g} requests are still in the engine {IDLE_TIMEOUT_S} s after the last user has gone")


class ScenarioShape(LoadTestShape):
    """The users of ``--scenario``, out of ``--users``, for ``--run-time``."""

    use_common_options = True

    def tick(self) -> tuple[int, float, list[type[Any]]] | None:
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        assert options is not None
        scenario = SCENARIOS[options.scenario]
        count = users_at(scenario, self.get_run_time(), options.num_users or 1, options.run_time)
        if count is None:
            return None
        return count, options.spawn_rate or 1, [globals()[name] for name in scenario.users]


class Guest(HttpUser):
    abstract = True
    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        with self.client.get("/info", catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                raise RuntimeError(f"no usable /info at {self.host}: is robuq-serve running?")
        options = self.environment.parsed_options
        self.workload = Workload(answer.json(), [int(count) for count in options.steps.split(",")], options.max_images)

    def ask(self, body: dict[str, Any], name: str) -> None:
        with self.client.post("/generate", json=body, name=name, catch_response=True) as answer:
            if self.was_served(answer):
                self.check(body, answer)

    def check(self, body: dict[str, Any], answer: ResponseContextManager) -> None:
        try:
            self.workload.check(body, answer.json())
        except (KeyError, ValueError, OSError) as error:
            answer.failure(f"bad answer: {error!r}")

    def was_served(self, answer: ResponseContextManager) -> bool:
        """Whether there is a picture to check; a 429 is set apart and its Retry-After obeyed."""
        if answer.status_code == 429:
            answer.request_meta["name"] += " (429 queue full)"
            answer.success()
            gevent.sleep(float(answer.headers.get("Retry-After", 1)))
            return False
        if answer.status_code != 200:
            answer.failure(f"status {answer.status_code}: {(answer.text or '')[:200]}")
            return False
        return True


class PlainUser(Guest):
    """Asks for one image after the other, all by default."""

    @task
    def generate(self) -> None:
        self.ask(self.workload.plain(), "/generate")


class ImageUser(Guest):
    """Somebody who looks at images: asks, waits for the answer, looks, asks again."""

    weight = 2

    @tag("json")
    @task(6)
    def generate_json(self) -> None:
        self.ask(self.workload.several(), "/generate")

    @tag("raw")
    @task(3)
    def generate_raw(self) -> None:
        body, image_format = self.workload.mixed(), random.choice(FORMATS)
        accept = {"Accept": f"image/{image_format}"}
        with self.client.post(
            "/generate", json=body, headers=accept, name="/generate raw", catch_response=True
        ) as answer:
            if self.was_served(answer):
                try:
                    check_image(answer.content or b"", image_format, self.workload.info["image_size"])
                    if answer.headers["X-Seed"] != str(body.get("seed", answer.headers["X-Seed"])):
                        raise ValueError("X-Seed is not the seed that was sent")
                except (KeyError, ValueError, OSError) as error:
                    answer.failure(f"bad answer: {error!r}")

    @tag("probe")
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
        with self.client.post(
            "/generate", json=body, name="/generate read slowly", stream=True, catch_response=True
        ) as answer:
            pieces = bytearray()
            for piece in answer.iter_content(SLOW_BYTES):
                pieces += piece
                gevent.sleep(SLOW_REST_S)
            answer._content = bytes(pieces)  # where requests keeps what was read
            if self.was_served(answer):
                self.check(body, answer)


def ran_out_of_patience(error: Exception | None) -> bool:
    """Whether the client's ``timeout`` has passed; requests has another name for that when it is within the body."""
    if isinstance(error, ConnectionError):
        return any(isinstance(cause, ReadTimeoutError) for cause in error.args)
    return isinstance(error, Timeout)


class Leaver(Guest):
    """Goes away after a while, with or without an answer."""

    @task
    def generate_and_leave(self) -> None:
        body, patience_s = self.workload.several(), random.uniform(0.005, 0.5)
        with self.client.post(
            "/generate", json=body, name="/generate", timeout=patience_s, catch_response=True
        ) as answer:
            if ran_out_of_patience(answer.error):  # the connection is closed now
                answer.request_meta["name"] += " (left)"
                answer.success()
            elif self.was_served(answer):
                self.check(body, answer)
