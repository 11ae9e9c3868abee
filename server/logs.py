"""Logs on standard output through the standard library: one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from server.settings import LogLevel

# Set by the HTTP layer for the length of a request; lines logged meanwhile carry it.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
# Its W3C trace id, if it has one.
current_trace_id: ContextVar[str] = ContextVar("current_trace_id", default="")

_PLAIN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then whatever came in ``extra``, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = current_request_id.get()
        if request_id:
            line["request_id"] = request_id
        trace_id = current_trace_id.get()
        if trace_id:
            line["trace_id"] = trace_id
        line.update((key, value) for key, value in vars(record).items() if key not in _PLAIN_ATTRIBUTES)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


def configure_logging(level: LogLevel) -> None:
    """Send every logger, uvicorn's too, to one handler."""
    logging.raiseExceptions = False  # a full disk behind standard output must not take requests down
    # Fields that no line has; looking them up costs time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Its start and stop lines repeat ours.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))
