"""One JSON object a line, whatever is logged."""

from __future__ import annotations

import json
import logging
import sys

from server.logs import JsonFormatter, current_request_id


def line(message: str, *arguments: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("server.test", logging.WARNING, __file__, 1, message, arguments, None)
    vars(record).update(extra)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    parsed: dict[str, object] = json.loads(text)
    return parsed


def test_message_level_time_and_extras() -> None:
    parsed = line("%d rows\nof %s", 3, "two requests", rows=3, path=object)
    assert (parsed["message"], parsed["level"], parsed["logger"]) == (
        "3 rows\nof two requests",
        "warning",
        "server.test",
    )
    assert parsed["rows"] == 3
    assert "class" in str(parsed["path"])
    assert str(parsed["time"]).endswith("+00:00")
    assert "request_id" not in parsed


def test_the_request_of_the_context_or_of_the_record() -> None:
    token = current_request_id.set("from-context")
    try:
        assert line("x")["request_id"] == "from-context"
        assert line("x", request_id="from-record")["request_id"] == "from-record"
    finally:
        current_request_id.reset(token)


def test_exceptions_keep_their_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        parsed = line("failed", exc_info=sys.exc_info())
    assert "ValueError: why" in str(parsed["exception"])
