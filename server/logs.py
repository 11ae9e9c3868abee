"""Logs on standard output through the standard library: one JSON object a line, or text for people."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from server.settings import LogFormat, LogLevel

# Set by the HTTP layer for the length of a request; lines logged meanwhile carry it.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
# Its W3C trace id, if it has one.
current_trace_id: ContextVar[str] = ContextVar("current_trace_id", default="")

_PLAIN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

# What moves the cursor of a terminal, or ends a line for some reader of logs.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

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


class TextFormatter(logging.Formatter):
    """One line a record, beneath it the indented traceback of an exception: no text of a client can begin a line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(
            lambda found: found.group().encode("unicode_escape").decode(), super().formatMessage(record)
        )

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join("  " + _CONTROL.sub(" ", line) for line in lines)


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send every logger, uvicorn's too, to one handler."""
    logging.raiseExceptions = False  # a full disk behind standard output must not take requests down
    # Fields that no line has; looking them up costs time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Its start and stop lines repeat ours.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))
