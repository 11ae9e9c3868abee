"""First come, first served, at the grain of one image and one denoising step.

A row is one image of one request. Rows join the batch at the next step, stay for all of their steps and leave when
done; a request wider than the free room is admitted in parts, so that no slot waits for its siblings.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.scheduler.interface import QueueFull, RowKey


@dataclass
class _Waiting:
    num_images: int
    next_index: int = 0  # images before it are admitted


class FirstComeScheduler:
    """Not thread-safe; the engine calls it under its own lock.

    Args:
        max_batch_rows: most rows in one step.
        max_queue_images: most images that may wait for their first step, over all requests.
    """

    def __init__(self, max_batch_rows: int, max_queue_images: int) -> None:
        if max_batch_rows < 1 or max_queue_images < 1:
            raise ValueError("max_batch_rows and max_queue_images must be at least 1")
        self.max_batch_rows = max_batch_rows
        self.max_queue_images = max_queue_images
        # Dicts keep their order of insertion: that of arrival, and that of admission.
        self._waiting: dict[int, _Waiting] = {}
        self._running: dict[RowKey, None] = {}
        self._waiting_images = 0

    @property
    def running_rows(self) -> int:
        return len(self._running)

    @property
    def waiting_images(self) -> int:
        return self._waiting_images

    @property
    def waiting_requests(self) -> int:
        """Requests none of whose images has been admitted."""
        # Only the head of the queue can be admitted in part.
        head = next(iter(self._waiting.values()), None)
        return len(self._waiting) - (1 if head is not None and head.next_index else 0)

    def submit(self, request_id: int, num_images: int) -> None:
        """Queue all images of a request, or raise :class:`QueueFull` and queue none."""
        if num_images < 1:
            raise ValueError("num_images must be at least 1")
        if request_id in self._waiting:
            raise ValueError(f"request {request_id} is already queued")
        excess = self._waiting_images + num_images - self.max_queue_images
        if excess > 0:
            raise QueueFull(excess)
        self._waiting[request_id] = _Waiting(num_images)
        self._waiting_images += num_images

    def schedule(self, *, admit: bool = True) -> tuple[RowKey, ...]:
        """The rows of the next step, longest in the batch first; with ``admit`` false no new row joins."""
        while admit and self._waiting and len(self._running) < self.max_batch_rows:
            request_id, head = next(iter(self._waiting.items()))
            self._running[RowKey(request_id, head.next_index)] = None
            head.next_index += 1
            self._waiting_images -= 1
            if head.next_index == head.num_images:
                del self._waiting[request_id]
        return tuple(self._running)

    def finish(self, key: RowKey) -> None:
        """Take a row that has made its last step out of the batch."""
        del self._running[key]

    def cancel(self, request_id: int) -> None:
        """Drop every row of a request, waiting or running; an unknown request is no error."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._waiting_images -= waiting.num_images - waiting.next_index
        for key in [key for key in self._running if key.request_id == request_id]:
            del self._running[key]
