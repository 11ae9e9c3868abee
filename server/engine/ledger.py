"""The requests in flight, under the engine's one lock, and how each of them ends.

The lock is never held during a forward, a decode or a callback: whoever takes a job out of the ledger resolves its
future after letting the lock go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from server.engine.errors import Cancelled, DeadlineExceeded, EngineError, GenerationFailed, NotReady, Overloaded
from server.engine.job import CancelReason, Job, Result, Timings
from server.metrics import Metrics
from server.scheduler import Demand, RowKey, Scheduler

logger = logging.getLogger(__name__)


class Ledger:
    """Methods that end in ``_locked``, and attributes, are for holders of ``lock``."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self.clock = clock
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # a replica may have something to do
        self.alarm = threading.Condition(self.lock)  # the supervisor has something to do
        self.alarm_at = 0.0  # when the supervisor looks by itself
        self.closed = False  # no step begins any more
        self.jobs: dict[int, Job] = {}
        self.changes = 0  # of which images are to be stepped
        self.rows_to_step = 0  # rows of the model in the next step, if all images were in it
        self.images_to_step = 0  # that have a step to make
        self.images = 0  # of all jobs in flight

    def open_locked(self, job: Job, client: str, priority: int) -> list[Job]:
        """Queue a job, or raise :class:`server.scheduler.QueueFull`. Returns those that had to make room for it."""
        displaced = self.scheduler.submit(
            Demand(
                request_id=job.id,
                num_images=len(job.specs),
                steps=job.steps,
                arrived_at=job.submitted_at,
                rows_per_image=job.rows_per_image,
                priority=priority,
                client=client,
                deadline=job.deadline,
            )
        )
        self.jobs[job.id] = job
        self.changes += 1
        job.generation.jobs += 1
        self.rows_to_step += len(job.specs) * job.rows_per_image
        self.images_to_step += len(job.specs)
        self.images += len(job.specs)
        self.work.notify(len(job.specs))
        if job.deadline < self.alarm_at:
            self.alarm.notify()
        return [self.jobs[request_id] for request_id in displaced]

    def stepped_locked(self, job: Job, image: int) -> None:
        """Image ``image`` has made its last step."""
        self.scheduler.finish(RowKey(job.id, image))
        self.changes += 1
        self._leave_locked(job, 1)

    def _leave_locked(self, job: Job, images: int) -> None:
        job.images_to_step -= images
        self.images_to_step -= images
        self.rows_to_step -= images * job.rows_per_image

    def late_locked(self, now: float) -> list[Job]:
        """The jobs past their deadlines, whether they wait, run, or have only their decoding left."""
        late = [self.jobs[request_id] for request_id in self.scheduler.expire(now)]
        # Few, and unknown to the scheduler.
        return late + [job for job in self.jobs.values() if job.images_to_step == 0 and job.deadline <= now]

    def complete(self, job: Job) -> None:
        """All images are there."""
        if not self._close(job, "completed"):
            return
        assert job.first_step_at is not None
        now = self.clock()
        timings = Timings(
            queue_s=job.first_step_at - job.submitted_at,
            inference_s=job.last_step_at - job.first_step_at,
            decode_s=now - job.last_step_at,
            total_s=now - job.submitted_at,
        )
        self.metrics.images.inc(len(job.specs))
        self.metrics.inference_time.observe(timings.inference_s)
        self.metrics.e2e_latency.observe(timings.total_s)
        job.future.set_result(Result(tuple(job.images[i] for i in range(len(job.specs))), timings))

    def fail(self, job: Job, error: BaseException) -> None:
        """Something raised on this request."""
        if self._close(job, "error"):
            logger.error("request failed", exc_info=error, extra={"request_id": job.request_id})
            job.future.set_exception(GenerationFailed("the model failed on this request"))

    def cancel(self, job: Job, reason: CancelReason) -> None:
        """Nobody wants it any more."""
        if self._close(job, reason):
            job.future.set_exception(Cancelled(f"request {reason}"))

    def displace(self, job: Job, retry_after_s: float) -> None:
        """It had to make room for another client's request."""
        if self._close(job, "displaced"):
            job.future.set_exception(Overloaded(retry_after_s))

    def expire(self, job: Job) -> None:
        """Its deadline has passed."""
        if self._close(job, "timeout"):
            job.future.set_exception(DeadlineExceeded("not done by the deadline"))

    def close_all(self, status: str, reason: str) -> None:
        """Refuse whatever is in flight, and let every thread of the engine end."""
        with self.lock:
            self.closed = True
            jobs = list(self.jobs.values())
            self.work.notify_all()
            self.alarm.notify_all()
        for job in jobs:
            if self._close(job, reason):
                error: EngineError = NotReady(status)
                job.future.set_exception(error)

    def _close(self, job: Job, reason: str) -> bool:
        """Take a job out; false when it was out already. Whoever gets true resolves its future."""
        with self.lock:
            if job.id not in self.jobs:
                return False
            self.metrics.requests.labels(reason).inc()  # first, so that an idle engine has counted all
            del self.jobs[job.id]
            self.scheduler.cancel(job.id)
            self.changes += 1
            self._leave_locked(job, job.images_to_step)
            self.images -= len(job.specs)
            job.generation.jobs -= 1
            if job.generation.retired_at is not None and job.generation.jobs == 0:
                self.alarm.notify()
        job.on_event = None  # what it holds should not outlive the request
        return True
