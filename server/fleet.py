"""The workers of one checkpoint and the requests for it: queued fairly, fed to workers, resolved; workers replaced.

A worker that dies is replaced after a pause; one whose forward, decoder or start hangs is killed first. Its images are
tried once more, and fail with their request if that worker dies, too. The event loop owns all of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.fair_queue import FairQueue, QueueFull
from server.launch import Handle, memory_file
from server.remote_worker import RemoteWorker, RunFailed, SentImage
from server.request import (
    Cancelled,
    EngineError,
    ModelInfo,
    Overloaded,
    Request,
    Result,
    Timings,
    WorkerDied,
)

if TYPE_CHECKING:
    from server.pool import Pool

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60.0
# More deaths of each replica than this within the window are no accidents.
MAX_DEATHS, DEATH_WINDOW_S = 3, 60.0
# Pause before a dead worker is replaced: four times as long after each further death within the window.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
# Until a worker that has closed its socket must have ended by itself.
EXIT_S = 1.0


class Fleet:
    """``settings.replicas`` workers, a file in memory with their weights, and what waits and runs on them."""

    def __init__(self, pool: Pool, checkpoint: Path | None, weights: int | None = None) -> None:
        settings = pool.settings
        self.pool, self.checkpoint = pool, checkpoint
        self.weights = memory_file("robuq-weights") if weights is None else weights
        self.model: ModelInfo | None = None  # once the weights are in the file
        self.queue: FairQueue[Request] = FairQueue(settings.max_queue_images, settings.priority_ageing_s)
        self.requests: dict[Request, None] = {}
        self.workers: list[RemoteWorker | None] = [None] * settings.replicas
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # all workers are warm
        self.ready.add_done_callback(_retrieve)
        self.retired = False  # another fleet gets the new requests
        self.closed = False
        self._deaths: deque[float] = deque()
        self._tried: set[tuple[Request, int]] = set()  # images whose worker has died once

    @property
    def present(self) -> list[RemoteWorker]:
        return [worker for worker in self.workers if worker is not None]

    @property
    def serving(self) -> list[RemoteWorker]:
        return [worker for worker in self.present if worker.phase == "ready"]

    def start(self, handles: Sequence[Handle] = ()) -> None:
        """Start the workers; ``handles``: those that have been started already."""
        for number in range(len(self.workers)):
            self._start_worker(number, handles[number] if handles else self.pool.launch(self.weights))

    def close(self, reason: str, error: EngineError) -> None:
        """End the workers, and with ``error`` what is in flight."""
        self.fail_all(reason, error)
        if self.closed:
            return
        self.closed = True
        self.ready.cancel()
        for worker in self.present:
            if worker.phase != "dead":
                worker.close()
            self.pool.spawn(self._bury(worker, "closed"))
        os.close(self.weights)

    # Requests.

    def submit(self, request: Request) -> None:
        """Queue a request; :class:`Overloaded` if there is no room."""
        request.submitted_at = self.pool.clock()
        request.future = asyncio.get_running_loop().create_future()
        try:
            displaced = self.queue.push(request)
        except QueueFull:
            self.pool.metrics.rejected.labels("queue_full").inc()
            raise Overloaded(self._seconds_left()) from None
        self.requests[request] = None
        request.on_cancel = lambda reason: self.fail(request, reason, Cancelled("request cancelled"))
        request.future.add_done_callback(_retrieve)
        for other in displaced:
            self.fail(other, "displaced", Overloaded(self._seconds_left()))
        self.dispatch()

    def dispatch(self) -> None:
        """Send images to workers while there is room, each to the one with the least to do."""
        queue, workers = self.queue, self.serving
        given: dict[RemoteWorker, None] = {}
        # Strictly in order: an image that does not fit holds up the line. That leaves less than one image's rows idle,
        # while letting smaller images pass could keep a larger one waiting for ever.
        while (head := queue.head()) is not None:
            rows = head.rows_per_image
            free = [worker for worker in workers if worker.has_room(rows)]
            if not free:
                break
            worker = free[0] if len(free) == 1 else min(free, key=lambda worker: worker.rows)
            worker.give(*queue.pop())
            given[worker] = None
        for worker in given:
            worker.flush()

    def first_step(self, request: Request, began: float, ended: float) -> None:
        if request.first_step_at is None:
            request.first_step_at = began
            self.pool.metrics.queue_time.observe(began - request.submitted_at)
            self.pool.metrics.time_to_first_step.observe(ended - request.submitted_at)

    def finished(self, request: Request, image: int, encoded: bytes, times: dict[str, Any]) -> None:
        """An image is done; ``times``: of its first and its last step, and seconds of decoding."""
        metrics = self.pool.metrics
        metrics.decode_duration.observe(times["decode_s"])
        request.images[image] = encoded
        request.first_step_at = min(times["first"], request.first_step_at or times["first"])
        request.last_step_at = max(times["last"], request.last_step_at)
        if len(request.images) < request.num_images:
            return
        now = self.pool.clock()
        timings = Timings(
            queue_s=request.first_step_at - request.submitted_at,
            inference_s=request.last_step_at - request.first_step_at,
            decode_s=now - request.last_step_at,
            total_s=now - request.submitted_at,
        )
        self._leave(request, "completed")
        metrics.images.inc(request.num_images)
        metrics.inference_time.observe(timings.inference_s)
        metrics.e2e_latency.observe(timings.total_s)
        request.future.set_result(Result(tuple(request.images[i] for i in range(request.num_images)), timings))

    def fail(self, request: Request, reason: str, error: EngineError) -> None:
        """End a request with ``error``, unless it has ended."""
        if request in self.requests:
            self._leave(request, reason)
            request.future.set_exception(error)
            self.dispatch()

    def fail_all(self, reason: str, error: EngineError) -> None:
        for request in list(self.requests):
            self.fail(request, reason, error)

    # What workers report.

    def loaded(self, model: ModelInfo) -> None:
        """A worker has its model; the first one has stored its weights for the others."""
        if self.model is None:
            self.model = model
            for other in self.present:
                if other.phase == "new" and other.transport is not None:  # else it loads once it is connected
                    other.load(store=False)

    def warmed_up(self, worker: RemoteWorker) -> None:
        if self.ready.done():
            logger.info("worker %d recovered", worker.number)
        elif len(self.serving) == len(self.workers):
            self.ready.set_result(None)
        self.dispatch()

    def lost(self, worker: RemoteWorker, reason: str, error: BaseException | None = None) -> None:
        """A worker has failed or closed its socket, or hangs (``reason`` says in what): end it and replace it."""
        sent = worker.sent if worker.phase == "ready" else {}
        worker.sent = {}
        worker.close()
        self.pool.spawn(self._bury(worker, reason))
        if self.closed:
            return
        self.workers[worker.number] = None
        error = error or RunFailed(f"worker {worker.number} {'hung in ' + reason if reason else 'died'}")
        # What does not load or run will not do so a second later, and a swap has somewhere to go back to.
        hopeless = not self.ready.done() and (reason == "failed" or not self.pool.serves(self))
        self._replace(worker.number, error, hopeless)
        self._retry(sent)

    # Inside.

    def _seconds_left(self) -> float:
        """How long what waits and runs takes, by the measured rows per second of all workers."""
        workers = self.serving
        rows_per_s = sum(worker.rows_per_s for worker in workers)
        running = sum(sent.request.image_cost for worker in workers for sent in worker.sent.values())
        return min(MAX_RETRY_AFTER_S, (self.queue.cost + running) / rows_per_s) if rows_per_s else 1.0

    def _leave(self, request: Request, reason: str) -> None:
        request.on_cancel = None
        del self.requests[request]
        self.queue.discard(request)
        if self._tried:
            self._tried -= {(request, image) for image in range(request.num_images)}
        if len(request.images) < request.num_images:
            for worker in self.present:
                worker.drop(request)
        self.pool.metrics.requests.labels(reason).inc()

    def _give_up(self, error: BaseException) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
        if self.pool.serves(self):
            self.pool.give_up(error)
        else:
            self.fail_all("error", WorkerDied("the workers of this checkpoint have died"))

    def _retry(self, sent: dict[int, SentImage]) -> None:
        for image in sent.values():
            request = image.request
            if request not in self.requests:
                continue
            if (request, image.image) in self._tried:
                logger.error("request failed: its worker died twice", extra={"request_id": request.request_id})
                self.fail(request, "error", WorkerDied("the worker died twice while generating this request"))
            else:
                self._tried.add((request, image.image))
                self.queue.put_back(request, image.image)
        self.dispatch()

    def _replace(self, number: int, error: BaseException, hopeless: bool = False) -> None:
        """Start a worker in place of one that ended with ``error``, after a pause; or give up."""
        now = self.pool.clock()
        self._deaths.append(now)
        while now - self._deaths[0] > DEATH_WINDOW_S:
            self._deaths.popleft()
        if hopeless or len(self._deaths) > MAX_DEATHS * len(self.workers):
            self._give_up(error)
            return
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 4 ** (len(self._deaths) - 1))

        async def start() -> None:
            await asyncio.sleep(pause_s)
            if self.closed:
                return
            logger.warning("replacing worker %d", number)
            try:
                self._start_worker(number, self.pool.launch(self.weights))
            except OSError as fault:  # no memory or descriptors for a process
                logger.error("worker %d cannot start: %s", number, fault)
                self._replace(number, RunFailed(f"worker {number} cannot start: {fault}"))

        self.pool.spawn(start())

    def _start_worker(self, number: int, handle: Handle) -> None:
        """The first worker loads the checkpoint; the others wait for that, and map its weights."""
        self.pool.handles.add(handle)
        worker = self.workers[number] = RemoteWorker(self, number, handle)

        async def connect() -> None:
            with suppress(OSError):  # closed before
                await worker.connect()
            loads = any(other.phase == "loading" for other in self.present)
            if worker.phase == "new" and (self.model is not None or not loads):
                worker.load(store=self.model is None)

        self.pool.spawn(connect())

    async def _bury(self, worker: RemoteWorker, reason: str) -> None:
        """See a worker's end, by force if it does not come; count it and log it unless it was closed."""
        handle, clock = worker.handle, self.pool.clock
        deadline = clock() + (EXIT_S if reason in ("", "failed", "closed") else 0.0)
        while (code := handle.exit_code()) is None:
            if clock() >= deadline:
                handle.kill()
            await asyncio.sleep(0.005)
        self.pool.handles.discard(handle)
        if reason == "closed":
            return
        kind = "failed" if reason == "failed" else "hung" if reason else "killed" if code < 0 else "exited"
        self.pool.metrics.worker_deaths.labels(kind).inc()
        how = f"hung in {reason}" if kind == "hung" else f"was killed by signal {-code}" if kind == "killed" else kind
        logger.error("worker %d %s", worker.number, how, extra={"worker_pid": handle.pid, "exit_code": code})


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Retrieve the exception, or asyncio logs it when nobody awaits the future."""
    if not future.cancelled():
        future.exception()
