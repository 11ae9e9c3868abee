"""Load on a running server: mixed classes, step counts, guidance, samplers, formats, JSON and raw answers.

    robuq-serve &
    locust -f loadtest --host http://127.0.0.1:8000                            # with its page on port 8089
    locust -f loadtest --host http://127.0.0.1:8000 --headless -u 16 -t 60s    # without

Every answer is checked: images decode and have the model's size, values that were sent come back. A 429 is counted
under its own name, not as a failure, and the user waits as long as Retry-After says. ``--tags json``, ``raw`` and
``probe`` narrow the mix. Locust is closed-loop: a slow server slows its users down, so what it reports under overload
are not the waits that independent clients would see.
"""

from __future__ import annotations

import base64
import io
import random
import urllib.request
from argparse import ArgumentParser
from typing import Any

import gevent
from locust import HttpUser, between, events, tag, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from PIL import Image

FORMATS = ("png", "jpeg", "webp")
SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
GUIDANCE_SCALES = (0, 1, 1.5, 4)
MAX_SEED = 2**32 - 1
READY_TIMEOUT_S = 60


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Options of the mix, shown on locust's page too."""
    parser.add_argument("--steps", default="4,10,20,50", help="step counts to draw from, comma-separated")
    parser.add_argument("--max-images", type=int, default=4, help="most images in one request, at most 16")


@events.test_start.add_listener
def wait_until_ready(environment: Environment, **_: Any) -> None:
    """A server that was started a moment ago is given time to load and warm up."""
    for _attempt in range(READY_TIMEOUT_S):
        try:
            with urllib.request.urlopen(f"{environment.host}/ready", timeout=5):
                return
        except OSError:  # not listening yet, or 503
            gevent.sleep(1)
    environment.process_exit_code = 1
    raise RuntimeError(f"{environment.host}/ready is not green after {READY_TIMEOUT_S} s")


def check_image(encoded: bytes, image_format: str, size: int) -> None:
    """Raise ValueError or OSError unless ``encoded`` is a whole square RGB image of ``size`` pixels."""
    image = Image.open(io.BytesIO(encoded))
    image.load()
    found = (image.format or "", image.size, image.mode)
    wanted = (image_format.upper(), (size, size), "RGB")
    if found != wanted:
        raise ValueError(f"image is {found}, not {wanted}")


class ImageUser(HttpUser):
    """Somebody who looks at images: asks, waits for the answer, looks, asks again."""

    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        with self.client.get("/info", catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                raise RuntimeError(f"no usable /info at {self.host}: is robuq-serve running?")
        self.info: dict[str, Any] = answer.json()
        options = self.environment.parsed_options
        self.step_counts = [int(count) for count in options.steps.split(",")]
        self.max_images: int = options.max_images

    def random_request(self) -> dict[str, Any]:
        """A body with the class alone, or with any of the other fields."""
        optional = {
            "steps": random.choice(self.step_counts),
            "guidance_scale": random.choice(GUIDANCE_SCALES),
            "sampler": random.choice(SAMPLERS),
            "seed": random.randint(0, MAX_SEED),
        }
        body = {name: value for name, value in optional.items() if name == "steps" or random.random() < 0.5}
        return body | {"class_id": random.randrange(self.info["num_classes"])}

    @tag("json")
    @task(6)
    def generate_json(self) -> None:
        body = self.random_request()
        body["num_images"] = random.randint(1, self.max_images)
        body["format"] = random.choice(FORMATS)
        with self.client.post("/generate", json=body, catch_response=True) as answer:
            if self.was_served(answer):
                try:
                    self.check_json(body, answer.json())
                except (KeyError, ValueError, OSError) as error:
                    answer.failure(f"bad answer: {error!r}")

    @tag("raw")
    @task(3)
    def generate_raw(self) -> None:
        body, image_format = self.random_request(), random.choice(FORMATS)
        accept = {"Accept": f"image/{image_format}"}
        with self.client.post(
            "/generate", json=body, headers=accept, name="/generate raw", catch_response=True
        ) as answer:
            if self.was_served(answer):
                try:
                    check_image(answer.content or b"", image_format, self.info["image_size"])
                    if answer.headers["X-Seed"] != str(body.get("seed", answer.headers["X-Seed"])):
                        raise ValueError("X-Seed is not the seed that was sent")
                except (KeyError, ValueError, OSError) as error:
                    answer.failure(f"bad answer: {error!r}")

    @tag("probe")
    @task(1)
    def probe(self) -> None:
        self.client.get(random.choice(("/health", "/ready", "/metrics")), name="probes")

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

    def check_json(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        """Raise unless the answer repeats what was asked and holds as many good images."""
        for name, value in body.items():
            if name != "num_images" and answer[name] != value:
                raise ValueError(f"{name} is {answer[name]!r}, not {value!r}")
        if len(answer["images"]) != body["num_images"]:
            raise ValueError(f"{len(answer['images'])} images, not {body['num_images']}")
        for image in answer["images"]:
            check_image(base64.b64decode(image, validate=True), body["format"], self.info["image_size"])
