"""What a client may watch of its request before the result is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepDone:
    """Image ``image`` has made ``steps_done`` of ``steps``."""

    image: int
    steps_done: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """The model's present estimate of image ``image``, encoded in the request's format."""

    image: int
    steps_done: int
    steps: int
    encoded: bytes


Event = StepDone | Preview

# Called from the engine's and the decoders' threads; it must return at once.
EventSink = Callable[[Event], None]
