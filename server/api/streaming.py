"""Answers as server-sent events: progress, previews and the result of a generation while it is under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from server.api.errors import as_api_error, closed_by_client
from server.api.generation import EventBuffer, Generation, client_gone
from server.engine import Event, Result

STEP = "image_generation.step"
PARTIAL_IMAGE = "image_generation.partial_image"
COMPLETED = "image_generation.completed"
ERROR = "error"

EVENT_STREAM = "text/event-stream"
# What OpenAPI 3.2 calls the schema of one event.
DOCUMENTED_EVENTS = {
    EVENT_STREAM: {
        "itemSchema": {
            "type": "object",
            "properties": {
                "event": {"type": "string", "enum": [STEP, PARTIAL_IMAGE, COMPLETED, ERROR]},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
            "required": ["event", "data"],
        }
    }
}
# A comment line, before proxies take the silence of a queue for a dead connection.
HEARTBEAT_S = 10.0

# Our server drains by itself; this library would cut streams off at the first signal.
AppStatus.enable_automatic_graceful_drain = False


class Narrator(Protocol):
    """What a route tells in its events; each payload is the event's name and its fields."""

    def progress(self, event: Event) -> tuple[str, Mapping[str, Any]] | None:
        """A step or a preview; None for nothing."""

    def completed(self, result: Result) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """The end of a success."""


async def stream_response(
    request: Request, generation: Generation, narrator: Narrator, headers: Mapping[str, str]
) -> Response:
    """Events of ``generation`` for one client; it leaves the generation when they end or the client hangs up.

    The answer begins with the first event or heartbeat: what fails earlier is an error as of any other request.
    """
    generation.join()
    began = False
    try:
        buffer = generation.subscribe()
        await _first_event(request, generation, buffer)
        response = _GenerationStream(generation, _events(generation, buffer, narrator, request.url.path), headers)
        began = True
        return response
    finally:
        if not began:
            generation.leave()


async def _first_event(request: Request, generation: Generation, buffer: EventBuffer) -> None:
    """Wait for it, for a heartbeat's time at most.

    Raises:
        ApiError, EngineError: the generation failed, or the client has gone.
    """
    event, gone = asyncio.ensure_future(buffer.wait()), asyncio.ensure_future(client_gone(request))
    try:
        await asyncio.wait((event, gone), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise closed_by_client()
        if generation.outcome.done():
            generation.result()
    finally:
        event.cancel()
        gone.cancel()


async def _events(
    generation: Generation, buffer: EventBuffer, narrator: Narrator, path: str
) -> AsyncIterator[ServerSentEvent]:
    while True:
        await buffer.wait()
        ended = generation.outcome.done()  # asked before the events are taken, so that none of them is lost
        for event in buffer.take():
            told = narrator.progress(event)
            if told is not None:
                yield _sse(*told)
        if ended:
            break
    try:
        result = generation.result()
    except Exception as error:
        failure = as_api_error(error)
        if failure is None:
            raise
        yield ServerSentEvent(failure.body(path).decode(), event=ERROR, sep="\n")
        return
    for told in narrator.completed(result):
        yield _sse(*told)


def _sse(name: str, fields: Mapping[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(to_json({"type": name, **fields}).decode(), event=name, sep="\n")


class _GenerationStream(EventSourceResponse):
    """Leaves its generation however it ends, even if no event was ever asked for."""

    def __init__(
        self, generation: Generation, events: AsyncIterator[ServerSentEvent], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, headers=headers, ping=HEARTBEAT_S, sep="\n")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.leave()
