"""A server of noise on a real socket, for the load tests to load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from waiting import WAIT_S, until

from server.api.app import create_app
from server.engine import Engine
from server.engine.create import create_engine
from server.fake import FakeSampler
from server.lifecycle import bind
from server.settings import Settings


@contextmanager
def fake_server(sampler: FakeSampler, **options: object) -> Iterator[tuple[str, Engine]]:
    """Its address and its engine, ready."""
    settings = Settings(**{"max_batch_rows": 8, "log_level": "warning", **options})  # type: ignore[arg-type]
    engine = create_engine([sampler], settings)
    server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), log_config=None, access_log=False))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            until(lambda: engine.status == "ready" and server.started)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
