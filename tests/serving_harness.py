"""What the server's tests share: a sampler that can be held and watched, workers in threads, pools and servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from waiting import WAIT_S, until

from robuq_core.params import RowSpec
from server.app import create_app
from server.fake import FakeRow, FakeSampler
from server.launch import bind
from server.lifecycle import uvicorn_config
from server.metrics import Metrics
from server.pool import Load, Pool
from server.request import CancelReason, Event, Request, Result
from server.settings import Settings
from server.worker import Worker

T = TypeVar("T")
MakeSampler = Callable[[dict[str, Any]], Any]


def spec(seed: int = 0, steps: int = 3, class_id: int = 0, guidance_scale: float = 1.0) -> RowSpec:
    return RowSpec(class_id, seed, steps, guidance_scale, "ddim")


def after(gate: threading.Event, function: Callable[[Any], T]) -> Callable[[Any], T]:
    """``function``, which now waits for ``gate`` first."""

    def wait(argument: Any) -> T:
        assert gate.wait(WAIT_S)
        return function(argument)

    return wait


class WatchedSampler(FakeSampler):
    """Remembers every batch as (seed, steps done) pairs. After :meth:`hold`, each step waits for a permit."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.batches: list[list[tuple[int, int]]] = []
        self.faulty_seeds: set[int] = set()
        self._held = False
        self._permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)  # one count for each step that was begun while held

    def hold(self) -> None:
        while self._permits.acquire(blocking=False):
            pass  # of the release before
        self._held = True

    def permit(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        self._held = False
        self._permits.release(100)  # for all that wait, workers that count as dead among them

    def step(self, rows: Sequence[FakeRow]) -> None:
        self.batches.append([(row.spec.seed, row.steps_done) for row in rows])
        if self._held:
            self.entered.release()
            assert self._permits.acquire(timeout=WAIT_S)
        if any(row.spec.seed in self.faulty_seeds for row in rows):
            raise RuntimeError("secret detail of /some/path")
        super().step(rows)


class ThreadHandle:
    """A worker in a thread. Killed, it can be heard no more; its thread ends when what it does returns."""

    pid = 0

    def __init__(self, make_sampler: MakeSampler) -> None:
        self.sock, self._theirs = socket.socketpair()
        self._killed = False
        self.worker = Worker(self._theirs, make_sampler)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._theirs, contextlib.suppress(SystemExit, KeyboardInterrupt):
            self.worker.run()

    def kill(self) -> None:
        self._killed = True
        with contextlib.suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)

    def exit_code(self) -> int | None:
        return -9 if self._killed else None if self._thread.is_alive() else 0


class Launcher:
    """Starts workers in threads. ``samplers`` has those of each checkpoint, by its path, in the order of replicas; a
    worker that is replaced gets the same one."""

    def __init__(self, samplers: Sequence[Any] | MakeSampler) -> None:
        self.samplers: dict[str | None, Sequence[Any]] = {}
        self.handles: list[ThreadHandle] = []
        if callable(samplers):
            self._make: MakeSampler = samplers
        else:
            self.samplers[None] = samplers
            self._make = lambda options: self.samplers[options["checkpoint"]][options["number"]]

    def __call__(self, settings: Settings, weights: int) -> ThreadHandle:
        self.handles.append(ThreadHandle(lambda options: self._make(options)))
        return self.handles[-1]


@dataclass(eq=False)
class Job:
    """A request under way, for other threads than the pool's."""

    request: Request
    future: Future[Result]


class Engine:
    """A pool for threads other than that of its event loop, with workers in threads."""

    def __init__(self, samplers: Sequence[Any] | MakeSampler, settings: Settings, **options: Any) -> None:
        self.launcher = Launcher(samplers)
        self.pool = Pool(settings, Metrics(settings.max_batch_rows), launch=self.launcher, **options)
        self.metrics = self.pool.metrics
        self.loop: asyncio.AbstractEventLoop | None = None
        start = self.pool.start

        async def start_here() -> None:
            self.loop = asyncio.get_running_loop()
            await start()

        self.pool.start = start_here  # type: ignore[method-assign]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call in the pool's thread."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def run(self, work: Any) -> Any:
        """Await in the pool's thread."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def __getattr__(self, name: str) -> Any:
        """``status``, ``model``, ``failure`` and ``idle`` are the pool's."""
        return getattr(self.pool, name)

    @property
    def requests_waiting(self) -> int:
        return self.load().requests_waiting

    @property
    def images_decoding(self) -> int:
        return self.load().images_decoding

    def load(self) -> Load:
        return self.call(self.pool.load)

    def submit(
        self,
        specs: Sequence[RowSpec],
        image_format: Any = "png",
        *,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> Job:
        """As ``Pool.submit``; raises what that raises. ``on_event`` is called in the pool's thread."""
        future: Future[Result] = Future()

        def submitted() -> Request:
            request = Request(
                self.pool.model, tuple(specs), image_format=image_format, watched=on_event is not None, **options
            )
            if on_event is not None:
                request.publish = on_event  # type: ignore[method-assign]
            self.pool.submit(request)
            future.set_running_or_notify_cancel()
            request.future.add_done_callback(lambda done: _copy(done, future))
            return request

        return Job(self.call(submitted), future)

    def cancel(self, job: Job, reason: CancelReason = "cancelled") -> None:
        self.call(job.request.cancel, reason)

    def swap(self, name: str, samplers: Sequence[Any] = ()) -> None:
        """Serve ``samplers`` under the path ``name``."""
        if samplers:
            self.launcher.samplers[name] = samplers
        self.run(self.pool.swap(Path(name)))

    def begin_drain(self) -> None:
        self.call(self.pool.begin_drain)

    def make_stale(self, number: int = 0, stage: str = "step") -> None:
        """What a worker of each checkpoint is doing (``step``: loading and warm-up, too; or ``decode``) seems to have
        begun longer ago than any limit, whatever the real time is; back when one of them counts as dead."""
        workers = self.call(lambda: [worker for fleet in self.pool._fleets if (worker := fleet.workers[number])])

        def changed() -> bool:
            for worker in workers:
                if stage == "step":
                    worker.heard_at -= 10_000
                for image in worker.sent.values() if stage == "decode" else ():
                    image.leaving_at -= 10_000 if image.leaving_at else 0
            return any(worker.phase == "dead" for worker in workers)

        # Again and again: what the worker has sent before may still arrive.
        until(lambda: self.call(changed), every_s=0.02)

    def kill(self, number: int = 0) -> None:
        """The worker's socket closes, as when its process is killed."""
        self.call(lambda: self.pool._fleet.workers[number].handle.kill())  # type: ignore[union-attr]


def _copy(done: asyncio.Future[Result], future: Future[Result]) -> None:
    if (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def make_settings(**options: object) -> Settings:
    """Small sizes; files hold pixels alone, so that tests can compare them; no cache, so that every image is new."""
    small = {"max_batch_rows": 4, "max_queue_images": 16, "log_level": "warning"}
    return Settings(**{**small, "embed_settings": False, "cache_bytes": 0, **options})  # type: ignore[arg-type]


@contextmanager
def started_engine(samplers: Sequence[Any] | MakeSampler, **options: Any) -> Iterator[Engine]:
    """A pool whose workers begin to load, in a thread with its event loop."""
    replicas = 1 if callable(samplers) else len(samplers)
    engine = Engine(samplers, make_settings(**{"replicas": replicas, **options}))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(engine.pool.start(), loop).result(WAIT_S)
    try:
        yield engine
    finally:
        _release(samplers)
        engine.run(engine.pool.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)


@contextmanager
def running_engine(*samplers: Any, **options: Any) -> Iterator[Engine]:
    """A pool with a worker for each sampler, past its warm-up, whose batches the samplers have forgotten."""
    with started_engine(samplers, **options) as engine:
        until(lambda: engine.status == "ready")
        for sampler in samplers:
            if isinstance(sampler, WatchedSampler):
                sampler.batches.clear()
        yield engine


def _release(samplers: Any) -> None:
    for sampler in samplers if isinstance(samplers, Sequence) else ():
        if isinstance(sampler, WatchedSampler):
            sampler.release()


def outcome(job: Job) -> BaseException | None:
    """What a job failed with; waits for its end."""
    return job.future.exception(timeout=WAIT_S)


def sample(engine: Engine, name: str, **labels: str) -> float:
    """A metric's present value; 0 while it has none."""
    return engine.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def live_server(samplers: Any, **options: Any) -> Iterator[tuple[httpx.Client, Engine]]:
    """The application on a real socket; a client of it and its pool.

    Args:
        samplers: one for each replica, a single one, or a function that makes one for the options of a worker.
    """
    if not callable(samplers) and not isinstance(samplers, Sequence):
        samplers = [samplers]
    settings = make_settings(**{"replicas": 1 if callable(samplers) else len(samplers), **options})
    engine = Engine(samplers, settings)
    server = uvicorn.Server(uvicorn_config(create_app(engine.pool, settings), settings))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in bind("127.0.0.1", 0)]
        port = sockets[0].getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
        thread.start()
        try:
            until(lambda: engine.status == "ready" and server.started)
            for sampler in samplers if isinstance(samplers, Sequence) else ():
                if isinstance(sampler, WatchedSampler):
                    sampler.batches.clear()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
                yield client, engine
        finally:
            _release(samplers)
            server.should_exit = True
            thread.join(WAIT_S)
