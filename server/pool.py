"""The workers: started, fed from one fair queue, watched, replaced. The event loop owns all of it; there are no locks.

A :class:`Fleet` is the workers of one checkpoint and the requests for it. A hot swap starts a second fleet, warms it
up, sends new requests there, and lets the first one finish what it has. A worker that dies is replaced after a pause;
one whose forward, decoder or start hangs is killed first. Its images are tried once more, and fail with their request
if that worker dies, too.

One file, since all of it changes the same fields: an event of a worker moves requests, queue and fleets together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.fair_queue import FairQueue, QueueFull
from server.launch import Handle, Launch, Prepared, ProcessHandle, memory_file
from server.metrics import Metrics, WorkerMemory
from server.remote_worker import RemoteWorker, RunFailed, SentImage
from server.request import (
    Cancelled,
    CancelReason,
    DeadlineExceeded,
    EngineError,
    ModelInfo,
    NotReady,
    Overloaded,
    Request,
    Result,
    Timings,
    WorkerDied,
)
from server.settings import Settings

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]

MAX_RETRY_AFTER_S = 60.0
# Between looks at what sends no signal: workers that hang.
WATCH_S = 0.25
# More deaths of each replica than this within the window are no accidents.
MAX_DEATHS, DEATH_WINDOW_S = 3, 60.0
# Pause before a dead worker is replaced: four times as long after each further death within the window.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
# Until a worker that has closed its socket must have ended by itself.
EXIT_S = 1.0


@dataclass(frozen=True)
class ReplicaLoad:
    """``rows`` of the model are in its next step, of ``row_budget`` at most. ``alive``: it takes images."""

    rows: int
    row_budget: int
    alive: bool


@dataclass(frozen=True)
class Load:
    """Requests run when at least one of their images does; decoding images are neither waiting nor run."""

    status: str
    requests_running: int
    requests_waiting: int
    images_in_flight: int
    images_waiting: int
    images_decoding: int
    replicas: tuple[ReplicaLoad, ...]


class Fleet:
    """The workers of one checkpoint, a file in memory with its weights, and the requests that are for it."""

    def __init__(self, checkpoint: Path | None, settings: Settings) -> None:
        self.checkpoint = checkpoint
        self.weights = memory_file("robuq-weights")
        self.stored = False  # the weights are in the file
        self.model: ModelInfo | None = None
        self.queue: FairQueue[Request] = FairQueue(settings.max_queue_images, settings.priority_ageing_s)
        self.requests: dict[Request, None] = {}
        self.workers: list[RemoteWorker | None] = [None] * settings.replicas
        self.deaths: deque[float] = deque()
        self.tried: set[tuple[Request, int]] = set()  # images whose worker has died once
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self.closed = False

    @property
    def serving(self) -> list[RemoteWorker]:
        """The workers that take images."""
        return [worker for worker in self.workers if worker is not None and worker.phase == "ready"]

    def close(self) -> None:
        """End the workers and free the weights."""
        self.closed = True
        self.ready.cancel()
        for worker in self.workers:
            if worker is not None and worker.phase != "dead":
                worker.close()
        os.close(self.weights)


class Pool:
    """Serves requests with ``settings.replicas`` workers.

    Args:
        launch: starts a worker.
        prepared: workers that have been started already, with the file for their weights.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        launch: Launch = ProcessHandle,
        prepared: Prepared | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.metrics, self.clock = settings, metrics, clock
        self.failure: BaseException | None = None  # what ended it, for the exit code and the log
        self.numbers = itertools.count()
        self._launch = launch
        self._prepared = prepared
        self._phase: Status = "starting"
        self._fleet: Fleet | None = None
        self._retired: list[Fleet] = []
        self._swapping = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handles: set[Handle] = set()  # whose end has not been seen
        self._next_watch = 0.0
        metrics.watch("requests_running", lambda: self.load().requests_running)
        metrics.watch("requests_waiting", lambda: self.load().requests_waiting)
        metrics.watch_workers(
            lambda: [
                WorkerMemory(worker.number, worker.handle.pid, worker.gpu_memory)
                for worker in (self._fleet.serving if self._fleet else ())
            ]
        )

    # State.

    @property
    def status(self) -> Status:
        """``restarting``: every worker has died, and none has been replaced yet."""
        if self._phase == "ready" and self._fleet is not None and not self._fleet.serving:
            return "restarting"
        return self._phase

    @property
    def model(self) -> ModelInfo:
        """Of the checkpoint that new requests are for.

        Raises:
            NotReady: none has been loaded yet.
        """
        if self._fleet is None or self._fleet.model is None:
            raise NotReady(self.status)
        return self._fleet.model

    @property
    def idle(self) -> bool:
        """No request is in flight."""
        return not any(fleet.requests for fleet in self._fleets)

    @property
    def _fleets(self) -> list[Fleet]:
        return [*([] if self._fleet is None else [self._fleet]), *self._retired]

    def load(self) -> Load:
        """What is running and waiting, and on which replica."""
        fleets = self._fleets
        workers = [worker for fleet in fleets for worker in fleet.workers if worker is not None]
        waiting = sum(fleet.queue.untouched for fleet in fleets)
        return Load(
            status=self.status,
            requests_running=sum(len(fleet.requests) for fleet in fleets) - waiting,
            requests_waiting=waiting,
            images_in_flight=sum(request.num_images for fleet in fleets for request in list(fleet.requests)),
            images_waiting=sum(fleet.queue.images for fleet in fleets),
            images_decoding=sum(len(worker.decoding) for worker in workers),
            replicas=tuple(
                ReplicaLoad(worker.rows, worker.budget, worker.phase == "ready")
                if worker is not None
                else ReplicaLoad(0, self.settings.max_batch_rows, False)
                for worker in (self._fleet.workers if self._fleet else ())
            ),
        )

    # Requests.

    def submit(self, request: Request) -> Request:
        """Queue a request without blocking; its ``future`` resolves when it has ended.

        Raises:
            NotReady: starting, restarting, draining, failed or stopped.
            Overloaded: the queue has no room.
        """
        fleet = self._fleet
        if self.status != "ready" or fleet is None:
            self.metrics.rejected.labels(self.status).inc()
            raise NotReady(self.status)
        loop = asyncio.get_running_loop()
        request.future, request.submitted_at = loop.create_future(), self.clock()
        try:
            displaced = fleet.queue.push(request)
        except QueueFull:
            self.metrics.rejected.labels("queue_full").inc()
            raise Overloaded(self._seconds_for(fleet)) from None
        fleet.requests[request] = None
        request.fleet = fleet
        request.cancel = lambda: self.cancel(request)
        timer = None
        if request.timeout_s < float("inf"):
            timer = loop.call_later(request.timeout_s, self.cancel, request, "timeout")
        request.future.add_done_callback(lambda future: _ended(request, timer))
        for other in displaced:
            self.fail(other, "displaced", Overloaded(self._seconds_for(fleet)))
        self.dispatch(fleet)
        return request

    async def generate(self, request: Request) -> Result:
        """Submit a request and wait for it; cancelling the caller cancels the request.

        Raises:
            EngineError: as :meth:`submit`, or what the request ended with.
        """
        self.submit(request).join()
        try:
            return await asyncio.shield(request.future)
        finally:
            request.leave()

    def cancel(self, request: Request, reason: CancelReason = "cancelled") -> None:
        """End a request: its rows are gone from the next step on. No-op when it has ended."""
        error = DeadlineExceeded("not done by the deadline") if reason == "timeout" else Cancelled("request cancelled")
        self.fail(request, reason, error)

    async def swap(self, checkpoint: Path) -> None:
        """Serve new requests with another checkpoint once its workers are warm; those in flight end on theirs.

        Raises:
            NotReady: the pool is not serving, or ceased to. LoadFailed: the file cannot be used. RunFailed: it loads
                but does not run. Then nothing has changed.
        """
        async with self._swapping:
            if self.status != "ready":
                raise NotReady(self.status)
            fleet = Fleet(checkpoint, self.settings)
            self._retired.append(fleet)  # so that it is watched, and ends with the pool
            try:
                self._start_workers(fleet)
                await fleet.ready
                if self._phase != "ready":
                    raise NotReady(self.status)
            except BaseException as error:
                self._retired.remove(fleet)
                self._close(fleet)
                if isinstance(error, asyncio.CancelledError) and self._phase != "ready":
                    raise NotReady(self.status) from None
                raise
            assert self._fleet is not None
            self._retired.remove(fleet)
            self._retired.append(self._fleet)
            self._serve(fleet)
            self._release_retired()
        logger.info("swapped the checkpoint", extra={"checkpoint": self.model.name})

    # Life.

    async def start(self) -> None:
        """Start the workers; ``status`` becomes ``ready`` when all are warm, or ``failed``."""
        self._fleet = Fleet(self.settings.checkpoint, self.settings)
        if self._prepared is not None:
            os.close(self._fleet.weights)
            self._fleet.weights = self._prepared.weights
        self._start_workers(self._fleet, self._prepared.handles if self._prepared else [])
        self._spawn(self._watch())

    def begin_drain(self) -> None:
        """Take no more requests; those in flight continue."""
        if self._phase in ("starting", "ready"):
            self._phase = "draining"

    async def stop(self) -> None:
        """Fail what is in flight and end every worker."""
        if self._phase not in ("failed", "stopped"):
            self._end("stopped")
        for task in self._tasks:
            task.cancel()
        deadline = self.clock() + EXIT_S
        while self._handles and self.clock() < deadline:
            self._handles = {handle for handle in self._handles if handle.exit_code() is None}
            await asyncio.sleep(0.005)
        for handle in self._handles:
            handle.kill()
            handle.exit_code()

    # What workers report.

    def loaded(self, worker: RemoteWorker, model: ModelInfo) -> None:
        """A worker has its model; the first of a fleet has stored its weights for the others."""
        fleet = worker.fleet
        if fleet.stored:
            return
        fleet.stored, fleet.model = True, model
        for other in fleet.workers:
            if other is not None and other.phase == "new":
                other.load(store=False)

    def warmed_up(self, worker: RemoteWorker) -> None:
        """A worker takes images now."""
        fleet = worker.fleet
        if fleet.ready.done():
            logger.info("worker %d has been replaced", worker.number)
        elif len(fleet.serving) == len(fleet.workers):
            fleet.ready.set_result(None)
            if fleet is self._fleet:
                self._serve(fleet)
                if self._phase == "starting":
                    self._phase = "ready"
        self.dispatch(fleet)

    def first_step(self, request: Request, began: float, ended: float) -> None:
        """An image of a request has made its first step."""
        if request.first_step_at is None:
            request.first_step_at = began
            self.metrics.queue_time.observe(began - request.submitted_at)
            self.metrics.time_to_first_step.observe(ended - request.submitted_at)

    def finished(self, request: Request, image: int, encoded: bytes, first: float, last: float) -> None:
        """An image is there."""
        if request.future.done():
            return
        request.images[image] = encoded
        request.first_step_at = min(first, request.first_step_at or first)
        request.last_step_at = max(last, request.last_step_at)
        if len(request.images) < request.num_images:
            return
        now = self.clock()
        timings = Timings(
            queue_s=request.first_step_at - request.submitted_at,
            inference_s=request.last_step_at - request.first_step_at,
            decode_s=now - request.last_step_at,
            total_s=now - request.submitted_at,
        )
        self._leave(request, "completed")
        self.metrics.images.inc(request.num_images)
        self.metrics.inference_time.observe(timings.inference_s)
        self.metrics.e2e_latency.observe(timings.total_s)
        request.future.set_result(Result(tuple(request.images[i] for i in range(request.num_images)), timings))

    def fail(self, request: Request, reason: str, error: EngineError) -> None:
        """End a request with ``error``, unless it has ended."""
        if request.cancel is None:
            return
        fleet = self._leave(request, reason)
        request.future.set_exception(error)
        self.dispatch(fleet)

    def dispatch(self, fleet: Fleet) -> None:
        """Send images to workers while there is room, each to the one with the least to do."""
        queue, workers = fleet.queue, fleet.serving
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

    def lost(self, worker: RemoteWorker, reason: str, error: BaseException | None = None) -> None:
        """A worker has failed or closed its socket, or hangs (``reason`` says in what): end it and replace it."""
        fleet, was_ready = worker.fleet, worker.phase == "ready"
        sent, worker.sent = worker.sent, {}
        worker.close()
        self._spawn(self._bury(worker, reason))
        if fleet.closed or self._phase in ("failed", "stopped"):
            return
        fleet.workers[worker.number] = None
        error = error or RunFailed(f"worker {worker.number} {'hangs in ' + reason if reason else 'has died'}")
        if not fleet.ready.done() and (reason == "failed" or fleet is not self._fleet):
            # What does not load or run will not do so a second later, and a swap has somewhere to go back to.
            self._give_up(fleet, error)
            return
        now = self.clock()
        fleet.deaths.append(now)
        while now - fleet.deaths[0] > DEATH_WINDOW_S:
            fleet.deaths.popleft()
        if len(fleet.deaths) > MAX_DEATHS * len(fleet.workers):
            self._give_up(fleet, error)
            return
        if was_ready:
            self._retry(fleet, sent)
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 4 ** (len(fleet.deaths) - 1))
        self._spawn(self._replace(fleet, worker.number, pause))

    # Inside.

    def _retry(self, fleet: Fleet, sent: dict[int, SentImage]) -> None:
        for image in sent.values():
            request = image.request
            if request.future.done():
                continue
            if (request, image.image) in fleet.tried:
                logger.error("request failed: its worker died twice", extra={"request_id": request.request_id})
                self.fail(request, "error", WorkerDied("its worker died, and so did the one that tried it again"))
            else:
                fleet.tried.add((request, image.image))
                fleet.queue.put_back(request, image.image)
        self.dispatch(fleet)

    async def _replace(self, fleet: Fleet, number: int, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        if not fleet.closed and self._phase not in ("failed", "stopped"):
            logger.warning("replacing worker %d", number)
            self._start_worker(fleet, number, self._launch(self.settings, fleet.weights))

    def _start_workers(self, fleet: Fleet, handles: list[Handle] | None = None) -> None:
        handles = handles or []
        for number in range(len(fleet.workers)):
            handle = handles[number] if handles else self._launch(self.settings, fleet.weights)
            self._start_worker(fleet, number, handle)

    def _start_worker(self, fleet: Fleet, number: int, handle: Handle) -> None:
        """The first worker of a fleet loads the checkpoint; the others wait for that, and map its weights."""
        self._handles.add(handle)
        worker = fleet.workers[number] = RemoteWorker(self, fleet, number, handle)

        async def connect() -> None:
            with suppress(OSError):  # closed before
                await worker.connect()
            loads = any(other is not None and other.phase == "loading" for other in fleet.workers)
            if worker.phase == "new" and (fleet.stored or not loads):
                worker.load(store=not fleet.stored)

        self._spawn(connect())

    def _serve(self, fleet: Fleet) -> None:
        """New requests are for this fleet from now on."""
        self._fleet = fleet
        assert fleet.model is not None
        self.metrics.describe_model(fleet.model)

    def _give_up(self, fleet: Fleet, error: BaseException) -> None:
        if fleet is not self._fleet:
            for request in list(fleet.requests):
                self.fail(request, "error", WorkerDied("the workers of this checkpoint have died"))
        if not fleet.ready.done():
            fleet.ready.set_exception(error)
        if fleet is self._fleet:
            self.failure = self.failure or error
            logger.critical("giving up: %s", error)
            self._end("failed")

    def _end(self, phase: Literal["failed", "stopped"]) -> None:
        self._phase = phase
        for fleet in self._fleets:
            for request in list(fleet.requests):
                self.fail(request, "shutdown" if phase == "stopped" else "error", NotReady(phase))
            self._close(fleet)

    def _close(self, fleet: Fleet) -> None:
        if fleet.closed:
            return
        fleet.close()
        for worker in fleet.workers:
            if worker is not None:
                self._spawn(self._bury(worker, "closed"))

    async def _bury(self, worker: RemoteWorker, reason: str) -> None:
        """See a worker's end, by force if it does not come; count it and log it unless it was closed."""
        handle = worker.handle
        deadline = self.clock() + (0.0 if reason not in ("", "failed", "closed") else EXIT_S)
        while (code := handle.exit_code()) is None and self.clock() < deadline:
            await asyncio.sleep(0.005)
        if code is None:
            handle.kill()
            while (code := handle.exit_code()) is None:
                await asyncio.sleep(0.05)
        self._handles.discard(handle)
        if reason == "closed":
            return
        kind = "failed" if reason == "failed" else "hung" if reason else "killed" if code < 0 else "exited"
        self.metrics.worker_deaths.labels(kind).inc()
        how = f"hung in {reason}" if kind == "hung" else f"was killed by signal {-code}" if kind == "killed" else kind
        logger.error("worker %d %s", worker.number, how, extra={"worker_pid": handle.pid, "exit_code": code})

    def _leave(self, request: Request, reason: str) -> Fleet:
        """Take a request out of its fleet."""
        request.cancel = None
        fleet: Fleet = request.fleet
        del fleet.requests[request]
        fleet.queue.discard(request)
        if fleet.tried:
            fleet.tried -= {(request, image) for image in range(request.num_images)}
        if len(request.images) < request.num_images:
            for worker in fleet.workers:
                if worker is not None:
                    worker.drop(request)
        self.metrics.requests.labels(reason).inc()
        if fleet is not self._fleet and not fleet.requests:
            asyncio.get_running_loop().call_soon(self._release_retired)
        return fleet

    def _release_retired(self) -> None:
        for fleet in [each for each in self._retired if each.ready.done() and not each.requests]:
            self._retired.remove(fleet)
            self._close(fleet)
            logger.info("released a swapped checkpoint")

    def _seconds_for(self, fleet: Fleet) -> float:
        """How long what waits and runs takes, by the measured rows per second of all workers."""
        workers = fleet.serving
        rows_per_s = sum(worker.rows_per_s for worker in workers)
        running = sum(sent.request.image_cost for worker in workers for sent in worker.sent.values())
        return min(MAX_RETRY_AFTER_S, (fleet.queue.cost + running) / rows_per_s) if rows_per_s else 1.0

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Kill workers that hang."""
        expected = self.clock() + WATCH_S
        while self._phase not in ("failed", "stopped"):
            await asyncio.sleep(WATCH_S)
            now = self.clock()
            if now - expected > WATCH_S:
                # This process itself was held up, and may not have read yet what its workers have sent.
                for worker in self._workers():
                    worker.heard_at += now - expected
            else:
                for worker in self._workers():
                    if what := worker.hung(now):
                        self.lost(worker, what)
            expected = self.clock() + WATCH_S

    def _workers(self) -> list[RemoteWorker]:
        return [worker for fleet in self._fleets for worker in fleet.workers if worker is not None]


def _ended(request: Request, timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
    if not request.future.cancelled():
        request.future.exception()  # looked at here, since every waiter may have left by now
