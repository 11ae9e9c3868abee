"""Window batching, what most servers do, to compare with: collect, run the batch to its end, collect again.

The order of admission, the bound of the queue and the deadlines are those of the continuous scheduler; an image that
is done before its batch is answers at once. What differs is when images may join, and that alone.
"""

from __future__ import annotations

from server.scheduler.batches import Batch, BatchScheduler


class WindowScheduler(BatchScheduler):
    """Not thread-safe. A batch begins when ``max_rows`` wait or when the first has waited for ``window_s``.

    Args:
        max_queue_images: most images that may wait for their first step, over all requests.
        window_s: longest time for which an idle replica collects.
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_queue_images: int, window_s: float, ageing_s: float = 5.0) -> None:
        super().__init__(max_queue_images, ageing_s)
        if not window_s >= 0:
            raise ValueError(f"window_s must be at least 0, not {window_s}")
        self.window_s = window_s

    def _may_join(self, batch: Batch, max_rows: int, now: float) -> bool:
        return not batch.images and (self._queue.rows >= max_rows or now >= self._window_end)

    def wake_at(self, now: float) -> float:
        # A window that has ended needs no waking: every idle replica's next call takes its images.
        window_end = self._window_end if self._window_end > now else float("inf")
        return min(super().wake_at(now), window_end)

    @property
    def _window_end(self) -> float:
        return self._queue.oldest_arrival + self.window_s
