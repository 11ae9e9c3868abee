"""From a bound port to an exit code: listening, draining on SIGTERM, ending within a bound."""

from __future__ import annotations

import gc
import logging
import os
import resource
import socket
import sys
import time
from types import FrameType
from typing import TextIO

import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.connection import PROBE_RESERVE, guarded
from server.launch import Prepared
from server.metrics import Metrics
from server.pool import Pool
from server.remote_worker import LoadFailed
from server.settings import Settings

logger = logging.getLogger(__name__)

# Time for the last answers to reach their clients once the pool has nothing left to do.
DELIVERY_TIMEOUT_S = 5
# Longer than the 60 s after which load balancers drop idle connections: the side that keeps one longest must be the
# server, or a request now and then meets a connection that is just being closed.
KEEP_ALIVE_S = 75


class DrainingServer(uvicorn.Server):
    """On SIGTERM or Ctrl+C: /ready turns 503 while the port stays open, what is in flight ends, then the server does.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, pool: Pool, drain_timeout_s: float) -> None:
        super().__init__(config)
        self.pool = pool
        self.drain_timeout_s = drain_timeout_s
        self._signals = 0
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1  # the next tick acts

    async def on_tick(self, counter: int) -> bool:
        if self.pool.status == "failed":
            return True
        if self._signals and self._drain_until is None:
            logger.info("draining", extra={"drain_timeout_s": self.drain_timeout_s})
            self._drain_until = time.monotonic() + self.drain_timeout_s
            self.pool.begin_drain()
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            if self.pool.idle or late or self._signals > 1:
                # What still waits gets a 503 now rather than a closed connection later.
                await self.pool.stop()
                return True
        return await super().on_tick(counter)


def allow_open_files(settings: Settings) -> None:
    """Raise this process's limit of open files to what its connections may need, as far as it may."""
    needed = settings.max_connections + PROBE_RESERVE + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < needed:
        logger.warning(
            "at most %d open files are allowed (ulimit -n), but --max-connections %d may need %d",
            *(most, settings.max_connections, needed),
        )


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs ``app``: its own log lines, headers and limits are replaced by ours."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app reads them, where it still knows the peer
        http=guarded(settings),
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DELIVERY_TIMEOUT_S,
    )


def serve(
    settings: Settings,
    sockets: list[socket.socket],
    prepared: Prepared = (None, ()),
    pool_type: type[Pool] = Pool,
) -> int:
    """Serve until a signal ends it; the exit code: 2 for a checkpoint that cannot be loaded, 1 for workers that fail.

    Args:
        prepared: workers that load already. pool_type: in place of the pool.
    """
    allow_open_files(settings)
    pool = pool_type(settings, Metrics(settings.max_batch_rows), prepared=prepared)
    server = DrainingServer(uvicorn_config(create_app(pool, settings), settings), pool, settings.drain_timeout_s)
    host, port = sockets[0].getsockname()[:2]
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    # Nearly all objects of a server stay for good; a collection that looks at them holds up every request.
    gc.freeze()
    gc.enable()
    server.run(sockets=sockets)
    code = 0
    if pool.failure is not None:
        unusable = isinstance(pool.failure, LoadFailed)
        fault = " ".join(str(pool.failure).split())
        print(f"error: {fault}" if unusable else f"error: the engine has failed: {fault}", file=sys.stderr)
        code = 2 if unusable else 1
    logger.info("stopped", extra={"exit_code": code})
    _flush_or_drop(sys.stdout)
    return code


def _flush_or_drop(stream: TextIO) -> None:
    """Write what is buffered; if there is no room for it, let it go, or the interpreter would exit with a code of its
    own when it fails to write it."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
