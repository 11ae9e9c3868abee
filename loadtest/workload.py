"""What the load tests ask for, how many users ask when, whether what comes back is right. Knows no client library."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from robuq_core import params

FORMATS = ("png", "jpeg", "webp")
# Fields whose whole range no user asks for; the others take any value of the range that ImageParams gives them.
CHOICES: dict[str, Sequence[Any]] = {
    "guidance_scale": (0, 1, 1.5, 4),
    "guidance_interval": ([0, 999], [0, 800]),
    "cache_interval": (1, 1, 2),
}
# Each request has its class and steps; several() chooses the number of images.
_OTHERS = ("class_id", "class_name", "num_images", "steps")


@dataclass
class Workload:
    """Random bodies of ``POST /generate``; equal seeds give equal bodies.

    Args:
        info: answer of ``GET /info``: classes, samplers, guidance and size of the images.
        step_counts: each equally likely.
        max_images: most images in one request.
        fields: that :meth:`mixed` sets, each in half of the bodies; all of ``ImageParams`` if None.
    """

    info: dict[str, Any]
    step_counts: Sequence[int] = (4, 10, 20, 50)
    max_images: int = 4
    rng: random.Random = field(default_factory=random.Random)
    fields: Sequence[str] | None = None

    def __post_init__(self) -> None:
        known = params.ImageParams.model_json_schema()["properties"]
        names = [name for name in known if name not in _OTHERS] if self.fields is None else self.fields
        self._schemas = {name: known[name]["anyOf"][0] for name in names}

    def plain(self) -> dict[str, Any]:
        """One image of a random class, if the model has classes; all else by default."""
        classes = self.info["num_classes"]
        return {"class_id": self.rng.randrange(classes)} if classes else {}

    def mixed(self) -> dict[str, Any]:
        """One image; steps, and at random some of the other fields."""
        chosen = {name: self._value(name) for name in self._schemas if self.rng.random() < 0.5}
        return self.plain() | {"steps": self.rng.choice(self.step_counts)} | chosen

    def _value(self, name: str) -> Any:
        schema = self._schemas[name]
        if name == "sampler":
            return self.rng.choice(self.info["samplers"])
        if name == "guidance_scale" and not self.info["guidance"]:
            return 1
        if choices := CHOICES.get(name) or schema.get("enum"):
            return self.rng.choice(choices)
        least, most = max(0, schema["minimum"]), schema["maximum"]
        return self.rng.randint(least, most) if schema["type"] == "integer" else self.rng.uniform(least, most)

    def several(self) -> dict[str, Any]:
        """Up to ``max_images`` images in a random format."""
        count, image_format = self.rng.randint(1, self.max_images), self.rng.choice(FORMATS)
        return self.mixed() | {"num_images": count, "format": image_format}

    def check(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        """Raise KeyError, ValueError or OSError unless ``answer`` repeats what ``body`` asked and holds its images."""
        for name, value in body.items():
            if name != "num_images" and answer[name] != value:
                raise ValueError(f"{name} is {answer[name]!r}, not {value!r}")
        wanted = body.get("num_images", 1)
        if len(answer["images"]) != wanted:
            raise ValueError(f"{len(answer['images'])} images, not {wanted}")
        for image in answer["images"]:
            check_image(base64.b64decode(image, validate=True), body.get("format", "png"), self.info["image_size"])


def check_image(encoded: bytes, image_format: str, size: int) -> None:
    """Raise ValueError or OSError unless ``encoded`` is a whole square RGB image of ``size`` pixels."""
    image = Image.open(io.BytesIO(encoded))
    image.load()
    found = (image.format or "", image.size, image.mode)
    wanted = (image_format.upper(), (size, size), "RGB")
    if found != wanted:
        raise ValueError(f"image is {found}, not {wanted}")


def gauges(metrics: str) -> dict[str, float]:
    """Unlabelled samples of a Prometheus text exposition by name."""
    lines = (line.split() for line in metrics.splitlines() if not line.startswith("#"))
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and "{" not in words[0]}


# What a scenario is, and which users of locustfile.py take part; their weights say how many of each.
SCENARIOS = {
    "mixed": ("any mix of fields, JSON and raw answers, probes", ("ImageUser",)),
    "steady": ("one image per request, defaults only, a constant number of users", ("PlainUser",)),
    "burst": ("steady, but most users leave and come back all at once", ("PlainUser",)),
    "slow": ("mixed, and clients that read the answer slowly", ("ImageUser", "SlowReader")),
    "disconnect": ("mixed, and clients that disconnect before the answer", ("ImageUser", "Leaver")),
}
BURST_PERIOD_S = 20.0


def users_at(scenario: str, seconds: float, users: int, run_time_s: float | None) -> int | None:
    """Users ``seconds`` after the start, at least one; None when the test is over. Between bursts: a quarter."""
    if run_time_s is not None and seconds >= run_time_s:
        return None
    calm = scenario == "burst" and seconds % BURST_PERIOD_S < BURST_PERIOD_S / 2
    return max(1, round(users / 4)) if calm else users
