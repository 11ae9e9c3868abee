"""What the engine asks of a scheduler: which rows run in a replica's next step. Knows no torch, HTTP or clock.

A row is one image of one request. Times are seconds on the caller's monotonic clock and come in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_PRIORITY = 9


class RowKey(NamedTuple):
    """Image number ``image`` of request ``request_id``."""

    request_id: int
    image: int


class QueueFull(Exception):
    """The queue has no room for all images of a request.

    ``excess``: images that must leave it first. ``cost``: rows of the model times steps that are expected to be run
    until they have left; those of the images that run count in full.
    """

    def __init__(self, excess: int, cost: float) -> None:
        super().__init__(f"the queue is {excess} image(s) too full")
        self.excess = excess
        self.cost = cost


@dataclass(frozen=True)
class Demand:
    """What a request asks of the engine.

    Args:
        num_images: rows of the request, each of ``steps`` steps.
        rows_per_image: rows of the model that an image takes in a step: 2 with guidance, else 1.
        priority: 0..:data:`MAX_PRIORITY`, the higher the sooner, among the requests of one client.
        client: who shares the server fairly with the other clients; the name of an API key, or empty.
        deadline: when nobody wants the answer any more.

    Raises:
        ValueError: a count below 1, or a priority out of range.
    """

    request_id: int
    num_images: int
    steps: int
    arrived_at: float
    rows_per_image: int = 1
    priority: int = 0
    client: str = ""
    deadline: float = float("inf")

    @property
    def image_cost(self) -> int:
        """Rows of the model times steps of one image."""
        return self.steps * self.rows_per_image

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "rows_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"priority must be 0..{MAX_PRIORITY}, not {self.priority}")


class Scheduler(Protocol):
    """Not thread-safe; the engine calls it under its own lock."""

    @property
    def waiting_requests(self) -> int:
        """Requests none of whose images has been admitted."""

    @property
    def waiting_images(self) -> int:
        """Images that have not been admitted."""

    @property
    def cost(self) -> int:
        """Rows of the model times steps of the images that wait or run; those that run count in full."""

    def running_rows(self, replica: int) -> int:
        """Rows of the model that the replica's admitted images take in a step."""

    def submit(self, demand: Demand) -> list[int]:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none.

        Returns the requests of other clients that had to make room; the scheduler has forgotten them.
        The scheduler knows the request until its last image is finished, or until it is cancelled.
        """

    def schedule(self, replica: int, max_rows: int, now: float, *, admit: bool = True) -> tuple[RowKey, ...]:
        """The images in the replica's next step, longest in the batch first.

        Images join while their rows fit into ``max_rows`` and stay until :meth:`finish` or :meth:`cancel`. One image
        is admitted to an idle replica even if it does not fit. With ``admit`` false none joins. When ``max_rows`` has
        become smaller than what runs, all of it is still returned, and none joins.
        """

    def expire(self, now: float) -> tuple[int, ...]:
        """Requests whose deadline has passed, waiting or running; they stay until they are cancelled."""

    def wake_at(self, now: float) -> float:
        """When :meth:`schedule` or :meth:`expire` should be called again though nothing was submitted or finished.

        ``now`` is that of the last call of :meth:`schedule`. The answer may be inf; it is in the past only while a
        request whose deadline has passed is not cancelled.
        """

    def finish(self, key: RowKey) -> None:
        """Take an image that has made its last step out of its batch. KeyError if it is not running."""

    def cancel(self, request_id: int) -> None:
        """Drop every image of a request, waiting or running; an unknown request is no error."""
