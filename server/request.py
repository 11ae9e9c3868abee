"""One request from the body to its bytes, the model it is for, and how it can end. Knows no torch and no HTTP.

A :class:`Request` is made by a route; :class:`server.fleet.Fleet` queues, feeds and resolves it in the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from robuq_core.config import PredictionType, SamplerConfig, rows_of
from robuq_core.images import ImageFormat
from robuq_core.params import RowSpec

MAX_PRIORITY = 9
MIN_TIMEOUT_S = 0.01

CancelReason = Literal["cancelled", "timeout"]
# hit: from memory. shared: with an equal request in flight. miss: generated for this request.
CacheOutcome = Literal["hit", "shared", "miss"]


class EngineError(Exception):
    """Base of what a request may end with."""


class Overloaded(EngineError):
    """The queue is full; room for this request is expected in ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class NotReady(EngineError):
    """No requests are accepted now. ``status``: see :attr:`server.pool.Pool.status`."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the server is {status}")
        self.status = status


class GenerationFailed(EngineError):
    """The model, the decoder or the encoder raised on this request. The cause is in the log, not in the answer."""


class WorkerDied(GenerationFailed):
    """The worker of this request died, and so did the one that tried it again."""


class Cancelled(EngineError):
    """Nobody waits for the request any more."""


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """What the server knows of a loaded checkpoint."""

    name: str
    path: Path
    class_names: tuple[str, ...]
    num_classes: int
    valid_classes: int  # valid ids, 1 for a model without classes
    prediction_type: PredictionType
    can_guide: bool
    image_size: int  # side in pixels
    defaults: SamplerConfig
    backend_name: str
    average_activation_bits: float
    weight_bytes: int  # of the network
    decoder_name: str
    decoder_weight_bytes: int
    digest: str  # of weights and configuration
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970


@dataclass(frozen=True)
class Timings:
    """Seconds; the first three add up to ``total_s``."""

    queue_s: Annotated[float, Field(description="Until the first step.")]
    inference_s: Annotated[float, Field(description="From the first step to the last.")]
    decode_s: Annotated[float, Field(description="Until every image was encoded.")]
    total_s: float


@dataclass(frozen=True)
class Result:
    """Images in the order of the request: files, or their base64 text if the request asks for that."""

    images: tuple[bytes, ...]
    timings: Timings


@dataclass(frozen=True)
class Event:
    """Image ``image`` has made ``steps_done`` of ``steps``; with ``preview``, the model's estimate of it by then,
    encoded as the images of the result are."""

    image: int
    steps_done: int
    steps: int
    preview: bytes = b""


class EventBuffer(asyncio.Event):
    """The latest progress and preview of each image until they are taken: a slow client skips some. It is set while
    there is something to take, or the request has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[tuple[int, bool], Event] = {}

    def put(self, event: Event) -> None:
        key = (event.image, bool(event.preview))
        self._latest.pop(key, None)  # so that it moves to the end
        self._latest[key] = event
        self.set()

    def take(self) -> list[Event]:
        """Every event since the last call, in order."""
        self.clear()
        events = list(self._latest.values())
        self._latest.clear()
        return events


@dataclass(eq=False)
class Request:
    """What is to be generated, and what has come of it. Each waiter calls :meth:`join` before and :meth:`leave` after.

    Args:
        specs: one for each image.
        seed: of the first image, as the answer reports it.
        as_base64: the images of the result are base64 text.
        timeout_s: how long its client waits.
        preview_every: steps between previews of each image, none after the last; 0 for none. Under load
            some are skipped.
        watched: :meth:`subscribe` will be called.
        client: name of the API key, whose requests share the server fairly with those of others.
        request_id: for the log.
        repeatable: equal requests give equal images, since the seed was chosen by the client.
    """

    model: ModelInfo
    specs: tuple[RowSpec, ...]
    seed: int = 0
    image_format: ImageFormat = "png"
    as_base64: bool = False
    priority: int = 0
    timeout_s: float = float("inf")
    preview_every: int = 0
    watched: bool = False
    client: str = ""
    request_id: str = ""
    repeatable: bool = False

    # The cache's: where the images come from, and the equal request in flight that generates them.
    source: CacheOutcome | None = None
    leader: Request | None = None

    # The fleet's.
    submitted_at: float = 0.0
    first_step_at: float | None = None
    last_step_at: float = 0.0
    images: dict[int, bytes] = field(default_factory=dict)
    future: asyncio.Future[Result] = field(init=False)
    on_cancel: Callable[[CancelReason], None] | None = None  # set while a fleet has it

    def __post_init__(self) -> None:
        self.rows_per_image = max((rows_of(spec.guidance_scale) for spec in self.specs), default=1)
        self.image_cost = self.rows_per_image * max((spec.steps for spec in self.specs), default=1)
        self._waiting = 0
        self._buffer: EventBuffer | None = None

    @property
    def num_images(self) -> int:
        return len(self.specs)

    @property
    def class_id(self) -> int | None:
        """Of the first image; None where the model has no classes."""
        return self.specs[0].class_id if self.model.num_classes else None

    @property
    def class_name(self) -> str:
        """Of the first image; empty where the checkpoint has no name for it."""
        class_id, names = self.specs[0].class_id, self.model.class_names
        return names[class_id] if class_id < len(names) else ""

    def join(self) -> None:
        """One more waits for the result."""
        if self.leader is not None:
            self.leader.join()
        self._waiting += 1

    def leave(self, reason: CancelReason = "cancelled") -> None:
        """One waits no more; the last to leave cancels what is still in progress."""
        if self.leader is not None:
            self.leader.leave(reason)
        self._waiting -= 1
        if not self._waiting:
            self.cancel(reason)

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        """End the request: its rows are gone from the next step on. No-op when it has ended."""
        if self.on_cancel is not None:
            self.on_cancel(reason)

    def subscribe(self) -> EventBuffer:
        """The events from now on, for its one reader; the buffer wakes at the end, too."""
        self._buffer = buffer = EventBuffer()
        self.future.add_done_callback(lambda _: buffer.set())
        return buffer

    def publish(self, event: Event) -> None:
        if self._buffer is not None:
            self._buffer.put(event)
