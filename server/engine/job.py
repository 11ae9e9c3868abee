"""A request inside the engine, and what comes out of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from server.engine.images import ImageFormat
from server.engine.model import Row, RowSpec

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
    specs: tuple[RowSpec, ...]
    image_format: ImageFormat
    submitted_at: float
    request_id: str = ""  # the client's or the server's name for it, for the log
    future: Future[Result] = field(default_factory=Future)
    rows: dict[int, Row] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    first_step_at: float | None = None
    last_step_at: float = 0.0

    def __post_init__(self) -> None:
        # A running future cannot be cancelled from outside, so resolving it can never raise in the engine's threads.
        self.future.set_running_or_notify_cancel()
