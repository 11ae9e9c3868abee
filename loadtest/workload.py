"""What the load tests ask for, and whether what comes back is right. Knows no client library."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

FORMATS = ("png", "jpeg", "webp")
SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
GUIDANCE_SCALES = (0, 1, 1.5, 4)
MAX_SEED = 2**32 - 1


@dataclass
class Workload:
    """Draws bodies of ``POST /generate``; equal seeds draw equal bodies.

    Args:
        info: answer of ``GET /info``: number of classes and size of the images.
        step_counts: each equally likely.
        max_images: most images in one request.
    """

    info: dict[str, Any]
    step_counts: Sequence[int] = (4, 10, 20, 50)
    max_images: int = 4
    rng: random.Random = field(default_factory=random.Random)

    def plain(self) -> dict[str, Any]:
        """One image of a random class, all else by default."""
        return {"class_id": self.rng.randrange(self.info["num_classes"])}

    def mixed(self) -> dict[str, Any]:
        """One image; steps, and at random some of guidance, sampler and seed."""
        optional = {
            "guidance_scale": self.rng.choice(GUIDANCE_SCALES),
            "sampler": self.rng.choice(SAMPLERS),
            "seed": self.rng.randint(0, MAX_SEED),
        }
        chosen = {name: value for name, value in optional.items() if self.rng.random() < 0.5}
        return self.plain() | {"steps": self.rng.choice(self.step_counts)} | chosen

    def several(self) -> dict[str, Any]:
        """Up to ``max_images`` images in a random format."""
        return self.mixed() | {
            "num_images": self.rng.randint(1, self.max_images),
            "format": self.rng.choice(FORMATS),
        }

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
