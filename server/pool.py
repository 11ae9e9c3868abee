"""The pool of workers as the routes see it: requests in, one checkpoint after the other, what runs and waits.

A :class:`~server.fleet.Fleet` is the workers of one checkpoint and the requests for it. A hot swap starts a second
fleet, warms it up, sends new requests there, and lets the first one finish what it has. The event loop owns all of it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.fleet import EXIT_S, Fleet
from server.launch import Handle, Launch, Prepared, ProcessHandle
from server.metrics import Metrics
from server.request import Cancelled, ModelInfo, NotReady, Request
from server.settings import Settings

logger = logging.getLogger(__name__)

Status = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]

# Between looks at what sends no signal: workers that hang, checkpoints that nothing needs any more.
WATCH_S = 0.25


@dataclass(frozen=True)
class ReplicaLoad:
    """``rows`` of the model are in its next step, of ``row_budget`` at most. ``alive``: it takes images."""

    rows: int
    row_budget: int
    alive: bool


@dataclass(frozen=True)
class Load:
    """Requests run from the start of their first image until all are encoded; images that decode have no step left."""

    status: str
    requests_running: int
    requests_waiting: int
    images_in_flight: int
    images_waiting: int
    images_decoding: int
    replicas: tuple[ReplicaLoad, ...]


class Pool:
    """Serves requests with ``settings.replicas`` workers.

    Args:
        launch: starts a worker.
        prepared: workers that have been started already, with the file for their weights.
    """

    fleet_type = Fleet

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        launch: Launch = ProcessHandle,
        prepared: Prepared = (None, ()),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.metrics, self.clock = settings, metrics, clock
        self.failure: BaseException | None = None  # what ended it, for the exit code and the log
        self.numbers = itertools.count()  # of the images that workers get
        self.handles: set[Handle] = set()  # of workers whose end has not been seen
        self._launch, self._prepared = launch, prepared
        self._phase: Status = "starting"
        self._fleet: Fleet | None = None  # that gets new requests
        self._fleets: list[Fleet] = []  # that one, those that finish what they have, one that warms up
        self.swapping = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.watch("requests_running", lambda: self.load().requests_running)
        metrics.watch("requests_waiting", lambda: self.load().requests_waiting)
        metrics.watch_workers(lambda: self._fleet.serving if self._fleet else [])

    @property
    def status(self) -> Status:
        """``restarting``: every worker has died, and none has been replaced yet."""
        if self._phase == "ready" and self._fleet is not None and not self._fleet.serving:
            return "restarting"
        return self._phase

    @property
    def ended(self) -> bool:
        return self._phase in ("failed", "stopped")

    @property
    def model(self) -> ModelInfo:
        """Of the checkpoint that new requests are for; NotReady before the first has been loaded."""
        if self._fleet is None or self._fleet.model is None:
            raise NotReady(self.status)
        return self._fleet.model

    @property
    def idle(self) -> bool:
        return not any(fleet.requests for fleet in self._fleets)

    def load(self) -> Load:
        fleets = self._fleets
        waiting = sum(fleet.queue.untouched for fleet in fleets)
        return Load(
            status=self.status,
            requests_running=sum(len(fleet.requests) for fleet in fleets) - waiting,
            requests_waiting=waiting,
            images_in_flight=sum(request.num_images for fleet in fleets for request in list(fleet.requests)),
            images_waiting=sum(fleet.queue.images for fleet in fleets),
            images_decoding=sum(len(worker.decoding) for fleet in fleets for worker in fleet.present),
            replicas=tuple(
                ReplicaLoad(worker.rows, worker.budget, worker.phase == "ready")
                if worker is not None
                else ReplicaLoad(0, self.settings.max_batch_rows, False)
                for worker in (self._fleet.workers if self._fleet else ())
            ),
        )

    def submit(self, request: Request) -> Request:
        """Queue a request without blocking; its ``future`` resolves when it has ended.

        Raises:
            NotReady: starting, restarting, draining, failed or stopped.
            Overloaded: the queue has no room.
        """
        if self.status != "ready" or self._fleet is None:
            self.metrics.rejected.labels(self.status).inc()
            raise NotReady(self.status)
        self._fleet.submit(request)
        return request

    async def start(self) -> None:
        """Start the workers; ``status`` becomes ``ready`` when all are warm, or ``failed``."""
        weights, handles = self._prepared
        self._fleet = self.fleet_type(self, self.settings.checkpoint, weights)
        self._fleets.append(self._fleet)
        self._fleet.ready.add_done_callback(self._started)
        self._fleet.start(handles)
        self.spawn(self._watch())

    async def swap(self, checkpoint: Path) -> None:
        """Serve new requests with another checkpoint once its workers are warm; those in flight end on theirs.

        Raises:
            NotReady: the pool is not serving, or ceased to. LoadFailed: the file cannot be used. RunFailed: it loads
                but does not run. Then nothing has changed.
        """
        async with self.swapping:
            if self.status != "ready":
                raise NotReady(self.status)
            fleet = self.fleet_type(self, checkpoint)
            self._fleets.append(fleet)  # so that it is watched, and ends with the pool
            try:
                fleet.start()
                await fleet.ready
                if self._phase != "ready":
                    raise NotReady(self.status)
            except BaseException as error:
                self._release(fleet)
                if isinstance(error, asyncio.CancelledError) and self._phase != "ready":
                    raise NotReady(self.status) from None
                raise
            assert self._fleet is not None
            self._fleet.retired, self._fleet = True, fleet
            self.metrics.describe_model(self.model)
        logger.info("swapped the checkpoint", extra={"checkpoint": self.model.name})

    def begin_drain(self) -> None:
        """Take no more requests; those in flight continue."""
        if self._phase in ("starting", "ready"):
            self._phase = "draining"

    async def stop(self) -> None:
        """Fail what is in flight and end every worker."""
        if not self.ended:
            self._end("stopped")
        for task in self._tasks:
            task.cancel()
        deadline = self.clock() + EXIT_S
        while self.handles and self.clock() < deadline:
            self.handles = {handle for handle in self.handles if handle.exit_code() is None}
            await asyncio.sleep(0.005)
        for handle in self.handles:
            handle.kill()
            handle.exit_code()

    # What fleets need of it.

    def launch(self, weights: int) -> Handle:
        return self._launch(self.settings, weights)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def serves(self, fleet: Fleet) -> bool:
        return fleet is self._fleet

    def give_up(self, error: BaseException) -> None:
        """The workers keep dying, or cannot start."""
        self.failure = self.failure or error
        logger.critical("giving up: %s", error)
        self._end("failed")

    # Inside.

    def _started(self, ready: asyncio.Future[None]) -> None:
        if not ready.cancelled() and ready.exception() is None:
            self.metrics.describe_model(self.model)
            if self._phase == "starting":
                self._phase = "ready"

    def _end(self, phase: Literal["failed", "stopped"]) -> None:
        self._phase = phase
        for fleet in self._fleets:
            fleet.close("shutdown" if phase == "stopped" else "error", NotReady(phase))

    def _release(self, fleet: Fleet) -> None:
        self._fleets.remove(fleet)
        fleet.close("cancelled", Cancelled("the checkpoint was released"))

    async def _watch(self) -> None:
        expected = self.clock() + WATCH_S
        while not self.ended:
            await asyncio.sleep(WATCH_S)
            now = self.clock()
            late_s = now - expected
            for worker in [worker for fleet in self._fleets for worker in fleet.present]:
                if late_s > WATCH_S:
                    # This process itself was held up, and may not have read yet what its workers have sent.
                    worker.heard_at += late_s
                elif what := worker.hung(now):
                    worker.fleet.lost(worker, what)
            for fleet in [fleet for fleet in self._fleets if fleet.retired and not fleet.requests]:
                self._release(fleet)
                logger.info("released a swapped checkpoint")
            expected = self.clock() + WATCH_S
