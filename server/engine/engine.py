"""The engine: replicas of a model behind one queue, stepping rows of many requests together.

Requests come in by :meth:`Engine.submit` from any thread and leave by their future. Delivery is apart from stepping:
whoever waits for a future may go away at any time without touching the replicas.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from server.engine.delivery import Delivery
from server.engine.errors import NotReady, Overloaded
from server.engine.events import EventSink
from server.engine.generation import Generation
from server.engine.images import ImageFormat
from server.engine.job import CancelReason, Job
from server.engine.ledger import Ledger
from server.engine.load import Load, ReplicaLoad
from server.engine.model import RowSpec, StepSampler
from server.engine.replica import Replica
from server.engine.supervisor import Supervisor
from server.engine.warm_up import WarmUp
from server.metrics import Metrics
from server.scheduler import ContinuousScheduler, QueueFull, Scheduler

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "draining", "stalled", "failed", "stopped"]

MAX_RETRY_AFTER_S = 60.0


class Engine:
    """Serves requests with one replica a sampler; the samplers are of one checkpoint.

    Args:
        max_batch_rows: most rows of the model in one forward of a replica; an image with guidance takes two.
        max_queue_images: most images that may wait for their first step.
        decode_threads: threads that decode and encode.
        stall_timeout_s: a forward that takes longer makes its replica stalled until it returns; when all of them are,
            the engine is.
        target_step_s: keep batches so small that a step takes at most this; None for no limit.
        priority_ageing_s: seconds of waiting that weigh as much as one level of priority.
        scheduler: in place of a ``ContinuousScheduler``; then the queue and the ageing are its own.
    """

    def __init__(
        self,
        samplers: Sequence[StepSampler],
        metrics: Metrics,
        *,
        max_batch_rows: int,
        max_queue_images: int,
        decode_threads: int = 1,
        stall_timeout_s: float = 120.0,
        target_step_s: float | None = None,
        priority_ageing_s: float = 5.0,
        scheduler: Scheduler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not samplers:
            raise ValueError("an engine needs at least one sampler")
        self.metrics = metrics
        self.failure: BaseException | None = None  # what the warm-up or the last replica died of
        self._phase: Status = "starting"
        self._ids = itertools.count()
        self._max_batch_rows = max_batch_rows
        self._stall_timeout_s = stall_timeout_s
        self._ledger = Ledger(scheduler or ContinuousScheduler(max_queue_images, priority_ageing_s), metrics, clock)
        self._delivery = Delivery(self._ledger, threads=decode_threads, max_pending=2 * max_batch_rows * len(samplers))
        self._replicas = tuple(
            Replica(
                number,
                self._ledger,
                self._delivery,
                peers=len(samplers),
                max_batch_rows=max_batch_rows,
                target_step_s=target_step_s,
                stall_timeout_s=stall_timeout_s,
            )
            for number in range(len(samplers))
        )
        self._supervisor = Supervisor(self._ledger, self._replicas, self._fail)
        self._swapping = threading.Lock()  # one warm-up at a time
        self._generation = Generation(samplers)
        self._serve(self._generation)
        metrics.watch_requests(running=lambda: self.requests_running, waiting=lambda: self.requests_waiting)

    # What others may ask.

    @property
    def sampler(self) -> StepSampler:
        """The first replica's sampler of the checkpoint that new requests meet; another one after a swap."""
        return self._generation.samplers[0]

    @property
    def status(self) -> Status:
        with self._ledger.lock:
            return self._status_locked()

    @property
    def idle(self) -> bool:
        """No request is in flight."""
        return not self._ledger.jobs

    @property
    def requests_waiting(self) -> int:
        with self._ledger.lock:
            return self._ledger.scheduler.waiting_requests

    @property
    def requests_running(self) -> int:
        with self._ledger.lock:
            return len(self._ledger.jobs) - self._ledger.scheduler.waiting_requests

    @property
    def images_decoding(self) -> int:
        """Finished images and previews that are being encoded or wait for it."""
        return self._delivery.pending

    def load(self) -> Load:
        """What is running and waiting, and on which replica."""
        ledger = self._ledger
        with ledger.lock:
            scheduler = ledger.scheduler
            return Load(
                status=self._status_locked(),
                requests_running=len(ledger.jobs) - scheduler.waiting_requests,
                requests_waiting=scheduler.waiting_requests,
                images_in_flight=ledger.images,
                images_waiting=scheduler.waiting_images,
                images_decoding=self._delivery.pending,
                replicas=tuple(
                    ReplicaLoad(scheduler.running_rows(replica.number), replica.stepper.budget.rows, replica.stalled)
                    for replica in self._replicas
                ),
            )

    # What others may do.

    def start(self) -> None:
        """Begin to warm up; ``status`` becomes ``ready`` when that is done, or ``failed``."""
        threading.Thread(target=self._start, name="start", daemon=True).start()

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
            preview_every: a ``Preview`` of every image after each so many steps but the last; 0 for none. Under load
                previews are left out.
            on_event: gets ``StepDone`` and ``Preview``, from other threads; it must return at once. A preview may
                still come when the future has resolved.
            sampler: what :attr:`sampler` was when the request was read; it serves it even if swapped since.

        Raises:
            NotReady: starting, draining, stalled, failed or stopped. Also, as ``starting``, when ``sampler`` has been
                gone for long.
            Overloaded: the queue has no room.
            ValueError: no specs, or a priority out of range.
        """
        ledger = self._ledger
        with ledger.lock:
            status = self._status_locked()
            generation = self._generation if sampler is None else self._generation_of(sampler)
            if status != "ready" or generation is None:
                status = status if status != "ready" else "starting"
                self.metrics.rejected.labels(status).inc()
                raise NotReady(status)
            now = ledger.clock()
            job = Job(
                id=next(self._ids),
                generation=generation,
                specs=tuple(specs),
                image_format=image_format,
                submitted_at=now,
                deadline=float("inf") if timeout_s is None else now + timeout_s,
                request_id=request_id,
                preview_every=preview_every,
                on_event=on_event,
            )
            try:
                displaced = ledger.open_locked(job, client, priority)
            except QueueFull as full:
                self.metrics.rejected.labels("queue_full").inc()
                raise Overloaded(self._seconds_for_locked(full.cost)) from None
            seconds = self._seconds_for_locked(ledger.scheduler.cost) if displaced else 0.0
        for other in displaced:
            ledger.displace(other, seconds)
        return job

    def cancel(self, job: Job, reason: CancelReason = "cancelled") -> None:
        """Give up a request: its rows are gone from the next step on. No-op when it has ended."""
        self._ledger.cancel(job, reason)

    def swap(self, samplers: Sequence[StepSampler]) -> None:
        """Serve new requests with these samplers, one a replica, once they are warm; those in flight keep theirs.

        The warm-up runs between the steps of the requests in flight. Returns when the change is made.

        Raises:
            NotReady: the engine is not serving, or ceased to. ValueError: another number of samplers than replicas.
            BaseException: whatever the new samplers raise in their warm-up, or a replica dies of meanwhile; then
                nothing has changed.
        """
        if len(samplers) != len(self._replicas):
            raise ValueError(f"{len(self._replicas)} replica(s) need as many samplers, not {len(samplers)}")
        with self._swapping:
            generation = Generation(samplers)
            if self.status != "ready":
                raise NotReady(self.status)
            self._warm_up(generation)
            with self._ledger.lock:
                if self._ledger.closed:
                    raise NotReady(self._phase)
                self._generation.retired_at = self._ledger.clock()
                self._supervisor.retired.append(self._generation)
                self._generation = generation
            self._serve(generation)
        logger.info("swapped the checkpoint", extra={"checkpoint": generation.samplers[0].checkpoint_name})

    def begin_drain(self) -> None:
        """Take no more requests; those in flight go on."""
        with self._ledger.lock:
            if self._phase in ("starting", "ready"):
                self._phase = "draining"

    def stop(self, join_timeout_s: float = 2.0) -> bool:
        """Fail what is in flight and end every thread after its present step or image. Returns whether all have."""
        self._end("stopped")
        self._delivery.stop()
        until = time.monotonic() + join_timeout_s
        joins = [*(replica.join for replica in self._replicas), self._delivery.join, self._supervisor.join]
        return all(join(max(0.0, until - time.monotonic())) for join in joins)

    # Inside.

    def _start(self) -> None:
        began = self._ledger.clock()
        for replica in self._replicas:
            replica.start()
        self._supervisor.start()
        try:
            with self._swapping:
                self._warm_up(self._generation)
        except BaseException as error:
            if not self._ledger.closed:
                self._fail(error)
            return
        with self._ledger.lock:
            if self._phase == "starting":
                self._phase = "ready"
        logger.info("warmed up", extra={"seconds": round(self._ledger.clock() - began, 3)})

    def _warm_up(self, generation: Generation) -> None:
        """Run every size on every replica; raises what the first one to fail raised."""
        warm_ups = []
        # Before a first checkpoint nobody waits. Later the requests in flight do, between the forwards of the new one.
        limit_s = None if generation is self._generation else self._stall_timeout_s / 2
        with self._ledger.lock:
            for replica in self._replicas:
                replica.warm_up = WarmUp(generation, replica.number, self._max_batch_rows, limit_s)
                warm_ups.append(replica.warm_up)
            self._ledger.work.notify_all()
        for warm_up in warm_ups:
            while not warm_up.wait(0.1):
                status = self.status
                # At the start a stall may pass, and nobody is served meanwhile; a swap has somewhere to go back to.
                if self._ledger.closed or (status == "stalled" and generation is not self._generation):
                    warm_up.fail(NotReady(status))
            if warm_up.failure is not None:
                for other in warm_ups:
                    other.fail(warm_up.failure)
                raise warm_up.failure

    def _serve(self, generation: Generation) -> None:
        for replica in self._replicas:
            replica.curve = generation.curves[replica.number]
        sampler = generation.samplers[0]
        self.metrics.describe_model(
            checkpoint=sampler.checkpoint_name,
            backend=sampler.backend_name,
            average_activation_bits=sampler.average_activation_bits,
            weight_bytes=sampler.weight_bytes,
            decoder=sampler.decoder.name,
            decoder_weight_bytes=sampler.decoder.weight_bytes,
        )

    def _generation_of(self, sampler: StepSampler) -> Generation | None:
        for generation in (self._generation, *self._supervisor.retired):
            if generation.samplers[0] is sampler:
                return generation
        return None

    def _status_locked(self) -> Status:
        if self._phase in ("starting", "ready", "draining") and all(replica.stalled for replica in self._replicas):
            return "stalled"
        return self._phase

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self._end("failed")

    def _end(self, phase: Literal["failed", "stopped"]) -> None:
        with self._ledger.lock:
            if self._phase not in ("failed", "stopped"):
                self._phase = phase
        self._ledger.close_all(phase, "shutdown" if phase == "stopped" else "error")

    def _seconds_for_locked(self, cost: float) -> float:
        """How long ``cost`` rows of the model times steps take, by the measured rows per second of all replicas."""
        rows_per_s = sum(replica.rows_per_s_locked for replica in self._replicas)
        return min(MAX_RETRY_AFTER_S, cost / rows_per_s) if rows_per_s else 1.0
