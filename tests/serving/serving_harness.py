"""What the server's tests share: a sampler that can be held and watched, engines and servers around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import uvicorn
from waiting import WAIT_S, until

from server.api.app import create_app
from server.engine import Engine, Job
from server.engine.create import create_engine
from server.engine.fake import FakeRow, FakeSampler
from server.engine.model import RowSpec, StepSampler
from server.lifecycle import bind, uvicorn_config
from server.settings import Settings


def spec(seed: int = 0, steps: int = 3, class_id: int = 0, guidance_scale: float = 1.0) -> RowSpec:
    return RowSpec(class_id, seed, steps, guidance_scale, "ddim")


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
        self._held = True

    def permit(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def release(self) -> None:
        self._held = False
        self._permits.release()

    def step(self, rows: Sequence[FakeRow]) -> None:
        self.batches.append([(row.spec.seed, row.steps_done) for row in rows])
        if self._held:
            self.entered.release()
            assert self._permits.acquire(timeout=WAIT_S)
        if any(row.spec.seed in self.faulty_seeds for row in rows):
            raise RuntimeError("secret detail of /some/path")
        super().step(rows)


def make_settings(**options: object) -> Settings:
    return Settings(**{"max_batch_rows": 4, "max_queue_images": 16, "log_level": "warning", **options})  # type: ignore[arg-type]


@contextmanager
def running_engine(*samplers: StepSampler, **options: object) -> Iterator[Engine]:
    """An engine with a replica a sampler, past its warm-up, whose batches the samplers have forgotten."""
    engine = create_engine(samplers, make_settings(**options))
    engine.start()
    until(lambda: engine.status == "ready")
    watched = [sampler for sampler in samplers if isinstance(sampler, WatchedSampler)]
    for sampler in watched:
        sampler.batches.clear()
    try:
        yield engine
    finally:
        for sampler in watched:
            sampler.release()
        engine.stop()


def outcome(job: Job) -> BaseException | None:
    """What a job failed with; waits for its end."""
    return job.future.exception(timeout=WAIT_S)


def sample(engine: Engine, name: str, **labels: str) -> float:
    """A metric's present value; 0 while it has none."""
    return engine.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def live_server(sampler: FakeSampler, **options: object) -> Iterator[tuple[httpx.Client, Engine]]:
    """The application on a real socket; a client of it and its engine."""
    settings = make_settings(**options)
    engine = create_engine([sampler], settings)
    server = uvicorn.Server(uvicorn_config(create_app(engine, settings), settings))
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            until(lambda: engine.status == "ready" and server.started)
            if isinstance(sampler, WatchedSampler):
                sampler.batches.clear()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
                yield client, engine
        finally:
            if isinstance(sampler, WatchedSampler):
                sampler.release()
            server.should_exit = True
            thread.join(WAIT_S)
