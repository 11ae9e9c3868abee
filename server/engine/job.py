"""A request inside the engine, and what comes out of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from server.engine.events import EventSink
from server.engine.generation import Generation
from server.engine.images import ImageFormat
from server.engine.model import Row, RowSpec, rows_of

CancelReason = Literal["cancelled", "timeout"]


@dataclass(frozen=True)
class Timings:
    """Seconds. The first three add up to ``total_s``.

    ``queue_s``: accepted until the first step of its first row. ``inference_s``: until the last step of its last row.
    ``decode_s``: until every image is encoded.
    """

    queue_s: float
    inference_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """Encoded images in the order of the request's rows."""

    images: tuple[bytes, ...]
    timings: Timings


@dataclass(eq=False)
class Job:
    """One request in flight. The engine's lock guards all that changes; ``future`` resolves exactly once."""

    id: int
    generation: Generation
    specs: tuple[RowSpec, ...]
    image_format: ImageFormat
    submitted_at: float
    deadline: float = float("inf")
    request_id: str = ""  # the client's or the server's name for it, for the log
    preview_every: int = 0  # steps; 0: no previews
    on_event: EventSink | None = None
    future: Future[Result] = field(default_factory=Future)
    rows: dict[int, Row] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    previews_under_way: set[int] = field(default_factory=set)  # of which images
    first_step_at: float | None = None
    last_step_at: float = 0.0

    def __post_init__(self) -> None:
        # A running future cannot be cancelled from outside, so resolving it can never raise in the engine's threads.
        self.future.set_running_or_notify_cancel()
        self.rows_per_image = max(map(rows_of, self.specs), default=1)
        self.steps = max((spec.steps for spec in self.specs), default=1)
        self.images_to_step = len(self.specs)
