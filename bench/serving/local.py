"""A pool with one real worker, without HTTP, for other threads than that of its event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from bench.serving.servers import MAX_ROWS, bench_settings
from robuq_core.params import RowSpec
from server.metrics import Metrics
from server.pool import Pool
from server.request import Request, Result


class LocalPool:
    """Submits from any thread; images are PNG files."""

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self._loop = pool, loop

    def submit(self, specs: Sequence[RowSpec]) -> Future[Result]:
        """Cancelling the future cancels the request."""

        async def generated() -> Result:
            request = self.pool.submit(Request(self.pool.model, tuple(specs)))
            request.join()
            try:
                return await asyncio.shield(request.future)
            finally:
                request.leave()

        return asyncio.run_coroutine_threadsafe(generated(), self._loop)

    def generate(self, specs: Sequence[RowSpec]) -> Result:
        return self.submit(specs).result()

    def metrics(self) -> str:
        return self.pool.metrics.render().decode()


@contextmanager
def local_pool() -> Iterator[LocalPool]:
    """One that is warm."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result()

    pool = Pool(bench_settings(), Metrics(MAX_ROWS))

    async def start() -> None:
        await pool.start()
        while pool.status == "starting":
            await asyncio.sleep(0.01)

    run(start())
    try:
        yield LocalPool(pool, loop)
    finally:
        run(pool.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
