"""From a bound port to exit code 0: listening, draining on SIGTERM, ending within a bound."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import TextIO

import uvicorn
from fastapi import FastAPI

from robuq_core.errors import UserError
from server.api.app import create_app
from server.api.connection import PROBE_RESERVE, guarded
from server.collector import settle
from server.engine import Engine
from server.engine.create import create_engine
from server.engine.model import StepSampler
from server.gpu_memory import watch_gpu_memory
from server.scheduler import Scheduler
from server.settings import Settings

logger = logging.getLogger(__name__)

# Time for the last answers to reach their clients once the engine has nothing left to do.
DELIVERY_TIMEOUT_S = 5
# Longer than the 60 s after which load balancers drop idle connections: whoever keeps one longest must be the server,
# or a request now and then meets a connection that is just being closed.
KEEP_ALIVE_S = 75

# A step lets go of Python's lock at each of its many short ops, and under load waits to get it back from the event loop
# for up to this long: the default of 5 ms tripled the time of a step.
SWITCH_INTERVAL_S = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the checkpoint is loaded, so that a taken one is told at once. Does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return sock


class DrainingServer(uvicorn.Server):
    """On SIGTERM or Ctrl+C: /ready turns 503 while the port stays open, what is in flight ends, then the server does.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_timeout_s: float) -> None:
        super().__init__(config)
        self.engine = engine
        self.drain_timeout_s = drain_timeout_s
        self._signals = 0
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Counted only: a handler may interrupt code that holds the engine's lock. The next tick acts.
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        if self.engine.status == "failed":
            return True
        if self._signals and self._drain_until is None:
            logger.info("draining", extra={"drain_timeout_s": self.drain_timeout_s})
            self._drain_until = time.monotonic() + self.drain_timeout_s
            self.engine.begin_drain()
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            if self.engine.idle or late or self._signals > 1:
                # Whoever is still waiting gets a 503 now rather than a closed connection later.
                await asyncio.to_thread(self.engine.stop, 0.0)
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
    samplers: Sequence[StepSampler], settings: Settings, sock: socket.socket, *, scheduler: Scheduler | None = None
) -> int:
    """Serve until told to end; the exit code. ``scheduler`` replaces the continuous one."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    allow_open_files(settings)
    engine = create_engine(samplers, settings, scheduler=scheduler)
    watch_gpu_memory(engine.metrics)
    config = uvicorn_config(create_app(engine, settings), settings)
    server = DrainingServer(config, engine, settings.drain_timeout_s)
    host, port = sock.getsockname()[:2]
    logger.info(
        "serving on http://%s:%d",
        f"[{host}]" if ":" in host else host,
        port,
        extra={"checkpoint": samplers[0].checkpoint_name, "backend": samplers[0].backend_name},
    )
    settle()
    server.run(sockets=[sock])
    if engine.failure is not None:
        fault = " ".join(f"{type(engine.failure).__name__}: {engine.failure}".split())
        print(f"error: the engine has failed: {fault}", file=sys.stderr)
    code = 0 if engine.failure is None else 1
    logger.info("stopped", extra={"exit_code": code})
    _flush_or_drop(sys.stdout)
    if not engine.stop(join_timeout_s=0.0):
        # A step or a decoder that does not return must not keep the process alive.
        os._exit(code)
    return code


def _flush_or_drop(stream: TextIO) -> None:
    """Write what is buffered; if there is no room for it, let it go, or the interpreter would exit with a code of its
    own when it fails to write it."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
