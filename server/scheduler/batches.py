"""What every scheduler does alike: a queue, a batch for each replica, deadlines. When images may join differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from server.scheduler.fair_queue import FairQueue
from server.scheduler.heap import Heap
from server.scheduler.interface import Demand, QueueFull, RowKey


@dataclass
class Batch:
    """The images on one replica, longest in the batch first."""

    rows: int = 0
    images: dict[RowKey, int] = field(default_factory=dict)  # -> rows of the image


@dataclass
class _Request:
    demand: Demand
    running: dict[RowKey, Batch] = field(default_factory=dict)


class BatchScheduler(ABC):
    """Implements :class:`server.scheduler.interface.Scheduler` but for :meth:`_may_join`."""

    def __init__(self, max_queue_images: int, ageing_s: float) -> None:
        if max_queue_images < 1:
            raise ValueError(f"max_queue_images must be at least 1, not {max_queue_images}")
        if not ageing_s > 0:
            raise ValueError(f"ageing_s must be above 0, not {ageing_s}")
        self._queue = FairQueue(max_queue_images, ageing_s)
        self._batches: dict[int, Batch] = {}
        self._requests: dict[int, _Request] = {}
        self._deadlines: Heap[int] = Heap()
        self._expired: dict[int, None] = {}

    @abstractmethod
    def _may_join(self, batch: Batch, max_rows: int, now: float) -> bool:
        """Whether images that wait may join this batch now, as far as its rows allow."""

    @property
    def max_queue_images(self) -> int:
        return self._queue.max_images

    @property
    def waiting_requests(self) -> int:
        return self._queue.untouched_requests

    @property
    def waiting_images(self) -> int:
        return self._queue.images

    @property
    def cost(self) -> int:
        running = sum(len(request.running) * request.demand.image_cost for request in self._requests.values())
        return self._queue.cost + running

    def running_rows(self, replica: int) -> int:
        return self._batch(replica).rows

    def submit(self, demand: Demand) -> list[int]:
        if demand.request_id in self._requests:
            raise ValueError(f"request {demand.request_id} has been submitted already")
        try:
            displaced = self._queue.push(demand)
        except QueueFull as full:
            raise QueueFull(full.excess, full.cost + self.cost - self._queue.cost) from None
        self._requests[demand.request_id] = _Request(demand)
        if demand.deadline < float("inf"):
            self._deadlines.push(demand.deadline, demand.request_id)
        for request_id in displaced:
            self._forget(request_id)
        return displaced

    def schedule(self, replica: int, max_rows: int, now: float, *, admit: bool = True) -> tuple[RowKey, ...]:
        batch = self._batch(replica)
        if admit and self._may_join(batch, max_rows, now):
            # Strictly in order: an image that does not fit holds up the line. That leaves less than one image's rows
            # idle, while letting smaller images pass could keep a larger one waiting for ever.
            while (demand := self._queue.head()) is not None and self._fits(demand, batch, max_rows):
                self._admit(demand, batch)
        return tuple(batch.images)

    def expire(self, now: float) -> tuple[int, ...]:
        while (first := self._deadlines.first()) is not None and first[0] <= now:
            self._deadlines.discard(first[1])
            self._expired[first[1]] = None
        return tuple(self._expired)

    def wake_at(self, now: float) -> float:
        if self._expired:
            return now
        first = self._deadlines.first()
        return float("inf") if first is None else first[0]

    def finish(self, key: RowKey) -> None:
        request = self._requests[key.request_id]
        batch = request.running.pop(key)
        batch.rows -= batch.images.pop(key)
        if not request.running and key.request_id not in self._queue:
            self._forget(key.request_id)

    def cancel(self, request_id: int) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        self._queue.discard(request_id)
        for key, batch in request.running.items():
            batch.rows -= batch.images.pop(key)
        self._forget(request_id)

    def _batch(self, replica: int) -> Batch:
        return self._batches.setdefault(replica, Batch())

    def _fits(self, demand: Demand, batch: Batch, max_rows: int) -> bool:
        return not batch.images or batch.rows + demand.rows_per_image <= max_rows

    def _admit(self, demand: Demand, batch: Batch) -> None:
        key = self._queue.pop()
        batch.images[key] = demand.rows_per_image
        batch.rows += demand.rows_per_image
        self._requests[demand.request_id].running[key] = batch

    def _forget(self, request_id: int) -> None:
        del self._requests[request_id]
        self._deadlines.discard(request_id)
        self._expired.pop(request_id, None)
