"""Continuous batching at the grain of one denoising step: what waits joins the next step, what is done leaves."""

from __future__ import annotations

from server.scheduler.batches import Batch, BatchScheduler


class ContinuousScheduler(BatchScheduler):
    """Not thread-safe. See :mod:`server.scheduler.fair_queue` for the order in which images are admitted.

    A request wider than the room is admitted in parts, on whichever replicas have room, so that no row of the model
    waits for an image's siblings.

    Args:
        max_queue_images: most images that may wait for their first step, over all requests.
        ageing_s: seconds of waiting that weigh as much as one level of priority.
    """

    def __init__(self, max_queue_images: int, ageing_s: float = 5.0) -> None:
        super().__init__(max_queue_images, ageing_s)

    def _may_join(self, batch: Batch, max_rows: int, now: float) -> bool:
        return True
