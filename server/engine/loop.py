"""The engine: one thread owns the model and steps rows of many requests together; a small pool decodes and encodes.

Requests come in by :meth:`Engine.submit` from any thread and leave by their future. Delivery is apart from stepping:
whoever waits for a future may go away at any time without touching the loop.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from server.engine.errors import Cancelled, EngineError, GenerationFailed, NotReady, Overloaded
from server.engine.events import EventSink
from server.engine.images import ImageFormat, encode_image
from server.engine.job import CancelReason, Job, Result, Timings
from server.engine.model import RowSpec, StepSampler
from server.metrics import Metrics
from server.scheduler import FirstComeScheduler, QueueFull, RowKey

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "draining", "stalled", "failed", "stopped"]

# Weight of the newest step in the running mean of the step time.
STEP_TIME_SMOOTHING = 0.1
MAX_RETRY_AFTER_S = 60.0


class Engine:
    """Serves requests with one sampler.

    Args:
        max_batch_rows: most images in one forward.
        max_queue_images: most images that may wait for their first step.
        decode_threads: threads that decode and encode.
        stall_timeout_s: a step that takes longer makes the engine ``stalled`` until it returns.
    """

    def __init__(
        self,
        samplers: Sequence[StepSampler],
        metrics: Metrics,
        *,
        max_batch_rows: int,
        max_queue_images: int,
        decode_threads: int = 2,
        stall_timeout_s: float = 120.0,
        target_step_s: float | None = None,
        priority_ageing_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sampler = samplers[0]
        self.sampler = sampler
        self.metrics = metrics
        self.stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._scheduler = FirstComeScheduler(max_batch_rows, max_queue_images)
        # Finished rows may pile up behind a slow decoder; beyond this no new row is admitted.
        self._max_decoding = 2 * max_batch_rows
        self._decoding = 0
        self._jobs: dict[int, Job] = {}
        self._ids = itertools.count()
        self._phase: Status = "starting"
        self.failure: BaseException | None = None  # what the loop died of
        self._step_began: float | None = None
        self._step_s = 0.0
        self._changed = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        metrics.describe_model(
            checkpoint=sampler.checkpoint_name,
            backend=sampler.backend_name,
            average_activation_bits=sampler.average_activation_bits,
            weight_bytes=sampler.weight_bytes,
        )
        metrics.watch_requests(running=lambda: self.requests_running, waiting=lambda: self.requests_waiting)

    # What others may ask.

    @property
    def status(self) -> Status:
        with self._changed:
            return self._status()

    @property
    def idle(self) -> bool:
        """No request is in flight."""
        with self._changed:
            return not self._jobs

    @property
    def requests_waiting(self) -> int:
        with self._changed:
            return self._scheduler.waiting_requests

    @property
    def requests_running(self) -> int:
        with self._changed:
            return len(self._jobs) - self._scheduler.waiting_requests

    def _status(self) -> Status:
        if self._phase in ("starting", "ready", "draining"):
            if self._step_began is not None and self._clock() - self._step_began > self.stall_timeout_s:
                return "stalled"
            if self._thread.ident is not None and not self._thread.is_alive():
                return "failed"
        return self._phase

    # What others may do.

    def start(self) -> None:
        """Begin to warm up; ``status`` becomes ``ready`` when that is done, or ``failed``."""
        self._thread.start()

    def submit(
        self,
        specs: Sequence[RowSpec],
        image_format: ImageFormat,
        *,
        request_id: str = "",
        client: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        preview_every: int = 0,
        on_event: EventSink | None = None,
        sampler: StepSampler | None = None,
    ) -> Job:
        """Queue a request of one row an image, without blocking.

        Args:
            client: who shares the server fairly with the other clients.
            priority: 0..9, the higher the sooner, among the requests of one client.
            timeout_s: seconds until the request fails with ``DeadlineExceeded``.
            preview_every: a ``Preview`` of every image after each so many steps; 0 for none.
            on_event: gets ``StepDone`` and ``Preview``, from other threads; it must return at once.
            sampler: what :attr:`sampler` was when the request was read; it serves it even if swapped since.

        Raises:
            NotReady: starting, draining, stalled, failed or stopped.
            Overloaded: the queue has no room.
        """
        with self._changed:
            status = self._status()
            if status != "ready":
                self.metrics.rejected.labels(status).inc()
                raise NotReady(status)
            job = Job(next(self._ids), tuple(specs), image_format, self._clock(), request_id)
            try:
                self._scheduler.submit(job.id, len(job.specs))
            except QueueFull as full:
                self.metrics.rejected.labels("queue_full").inc()
                raise Overloaded(self._seconds_until_free(full.excess)) from None
            self._jobs[job.id] = job
            self._changed.notify_all()
        return job

    def cancel(self, job: Job, reason: CancelReason = "cancelled") -> None:
        """Give up a request: its rows are gone from the next step on. No-op when it has ended."""
        if self._close(job, reason):
            job.future.set_exception(Cancelled(f"request {reason}"))

    def begin_drain(self) -> None:
        """Take no more requests; those in flight go on."""
        with self._changed:
            if self._phase in ("starting", "ready"):
                self._phase = "draining"

    def stop(self, join_timeout_s: float = 2.0) -> bool:
        """Fail what is in flight and end the loop after its present step. Returns whether it has ended."""
        self._end("stopped")
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join(join_timeout_s)
        return not self._thread.is_alive()

    # The loop.

    def _run(self) -> None:
        try:
            began = self._clock()
            self._warm_up()
            with self._changed:
                if self._phase == "starting":
                    self._phase = "ready"
            logger.info("warmed up", extra={"seconds": round(self._clock() - began, 3)})
            while plan := self._next_rows():
                try:
                    self._advance(plan)
                except Exception:
                    # Not a fault of a row (those are caught beneath), so it is ours: the rows go, the loop stays.
                    logger.exception("engine step failed outside the model")
                    for job, _ in plan:
                        self._fail(job)
        except BaseException as error:
            self.failure = error
            logger.critical("the engine loop has died", exc_info=True)
            self._end("failed")

    def _warm_up(self) -> None:
        """Run the smallest and the largest batch once, so that no client pays for allocation and compilation."""
        defaults = self.sampler.defaults
        for size in sorted({1, self._scheduler.max_batch_rows}):
            rows = [
                self.sampler.start(
                    RowSpec(
                        class_id=i % self.sampler.num_classes,
                        seed=i,
                        steps=1,
                        guidance_scale=defaults.guidance_scale,
                        sampler=defaults.sampler,
                    )
                )
                for i in range(size)
            ]
            self._timed_step(rows)
        encode_image(self.sampler.decode(rows[0]), "png")

    def _next_rows(self) -> list[tuple[Job, int]] | None:
        """Wait for work; the rows of the next step, or None when the engine has been stopped."""
        with self._changed:
            while self._phase not in ("stopped", "failed"):
                keys = self._scheduler.schedule(admit=self._decoding < self._max_decoding)
                if keys:
                    return [(self._jobs[key.request_id], key.image) for key in keys]
                self._changed.wait()
        return None

    def _advance(self, plan: list[tuple[Job, int]]) -> None:
        """One step: start the rows that are new, run the forward, hand the finished ones to the decoders."""
        batch: list[tuple[Job, int, Any]] = []
        for job, index in plan:
            row = job.rows.get(index)
            if row is None:
                try:
                    row = job.rows[index] = self.sampler.start(job.specs[index])
                except Exception:
                    self._fail(job)
                    continue
            batch.append((job, index, row))
        if not batch:
            return
        began = self._clock()
        faulty = self._step_isolated([row for _, _, row in batch])
        ended = self._clock()
        for position, error in faulty.items():
            self._fail(batch[position][0], error)
        with self._changed:
            for job, index, row in batch:
                if job.id not in self._jobs:
                    continue  # cancelled or failed during the step
                if job.first_step_at is None:
                    job.first_step_at = began
                    self.metrics.queue_time.observe(began - job.submitted_at)
                    self.metrics.time_to_first_step.observe(ended - job.submitted_at)
                if row.done:
                    del job.rows[index]
                    job.last_step_at = ended
                    self._scheduler.finish(RowKey(job.id, index))
                    self._decoding += 1
                    self._pool.submit(self._decode, job, index, row)

    def _step_isolated(self, rows: list[Any]) -> dict[int, Exception]:
        """Step all rows together; if that raises, those that did not advance one by one. Returns the faulty ones."""
        before = [row.steps_done for row in rows]
        try:
            self._timed_step(rows)
            return {}
        except Exception as error:
            if len(rows) == 1:
                return {0: error}
            logger.warning("a step of %d rows failed (%r); retrying them one at a time", len(rows), error)
        faulty: dict[int, Exception] = {}
        for position, row in enumerate(rows):
            # A row's result does not depend on its neighbours, so stepping it alone changes nothing for it.
            if row.steps_done == before[position]:
                try:
                    self._timed_step([row])
                except Exception as error:
                    faulty[position] = error
        return faulty

    def _timed_step(self, rows: list[Any]) -> None:
        began = self._clock()
        with self._changed:
            self._step_began = began
        try:
            self.sampler.step(rows)
        finally:
            seconds = self._clock() - began
            with self._changed:
                self._step_began = None
                self._step_s += (seconds - self._step_s) * (STEP_TIME_SMOOTHING if self._step_s else 1.0)
            self.metrics.engine_steps.inc()
            self.metrics.step_duration.observe(seconds)
            self.metrics.batch_rows.observe(len(rows))

    # Delivery: decode threads, and whoever ends a job.

    def _decode(self, job: Job, index: int, row: Any) -> None:
        try:
            if job.id in self._jobs:  # else nobody waits for it any more
                began = self._clock()
                image = encode_image(self.sampler.decode(row), job.image_format)
                self.metrics.decode_duration.observe(self._clock() - began)
                with self._changed:
                    job.images[index] = image
                    complete = len(job.images) == len(job.specs)
                if complete:
                    self._complete(job)
        except Exception as error:
            self._fail(job, error)
        finally:
            with self._changed:
                self._decoding -= 1
                self._changed.notify_all()

    def _complete(self, job: Job) -> None:
        if not self._close(job, "completed"):
            return
        assert job.first_step_at is not None
        now = self._clock()
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

    def _fail(self, job: Job, error: Exception | None = None) -> None:
        if self._close(job, "error"):
            # Without an error at hand, the one being handled is the cause.
            logger.error("request failed", exc_info=error or True, extra={"request_id": job.request_id})
            job.future.set_exception(GenerationFailed("the model failed on this request"))

    def _close(self, job: Job, reason: str) -> bool:
        """Take a job out of the engine; false when it was out already. Whoever gets true resolves its future."""
        with self._changed:
            if self._jobs.pop(job.id, None) is None:
                return False
            self._scheduler.cancel(job.id)
            self._changed.notify_all()
        self.metrics.requests.labels(reason).inc()
        return True

    def _end(self, phase: Literal["failed", "stopped"]) -> None:
        with self._changed:
            if self._phase not in ("failed", "stopped"):
                self._phase = phase
            jobs = list(self._jobs.values())
            self._changed.notify_all()
        for job in jobs:
            if self._close(job, "shutdown" if phase == "stopped" else "error"):
                error: EngineError = NotReady(phase)
                job.future.set_exception(error)

    def _seconds_until_free(self, images: int) -> float:
        """When ``images`` more will have left the queue, by the present step time and mean steps an image."""
        steps = [spec.steps for job in self._jobs.values() for spec in job.specs[:1]]
        mean_steps = sum(steps) / max(1, len(steps))
        rounds = math.ceil(images / self._scheduler.max_batch_rows)
        return min(MAX_RETRY_AFTER_S, rounds * mean_steps * self._step_s)
