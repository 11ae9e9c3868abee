"""What the routes that generate images share: from a request to the pool, and from the result to the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from server.access import client_of, image_budget
from server.cache import CACHE_HEADER, Cache
from server.classes import ClassIndex
from server.errors import ApiError, as_api_error, closed_by_client, invalid
from server.keys import KeyStore
from server.logs import current_request_id
from server.pool import Pool
from server.request import (
    MIN_TIMEOUT_S,
    CancelReason,
    Event,
    EventBuffer,
    ModelInfo,
    NotReady,
    Request,
    Result,
    Timings,
)
from server.settings import Settings
from server.telemetry import Telemetry

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
STEP = "image_generation.step"
PARTIAL_IMAGE = "image_generation.partial_image"
COMPLETED = "image_generation.completed"
ERROR = "error"
# A comment line, before proxies take the silence of a queue for a dead connection.
HEARTBEAT_S = 10.0
# An answer above this is written in parts, so that no other request waits for it to be copied.
_ONE_PART_BYTES = 1 << 17

_HEADERS = {
    "X-Request-Id": "The client's id for this request, or one that the server made.",
    "x-queue-time": "Seconds until the first step.",
    "x-inference-time": "Seconds of the steps.",
    "x-total-time": "Seconds in all.",
    "X-Seed": "The seed of the first image.",
    CACHE_HEADER: "hit: the images were generated before; shared: for an equal request in flight; miss: for this one. "
    "Absent where no seed was given.",
}
_ERRORS = {
    400: "`invalid_request`: a field is missing, unknown or out of range",
    401: "`unauthorized`: no API key, or an invalid one",
    403: "`forbidden`: the key lacks the scope; under /admin `admin_closed`: the server has no keys",
    404: "`not_found`, `model_not_found`",
    406: "`not_acceptable`: Accept names no type that is offered",
    409: "`swap_in_progress`",
    413: "`body_too_large`",
    422: "`invalid_request`: a field is missing, unknown or out of range; `checkpoint_unusable`",
    429: "`queue_full`; `rate_limited`: the key's limit. Retry-After says when to try again",
    500: "`generation_failed`, `internal_error`",
    503: "`not_ready`, `draining`: starting, restarting or draining",
    504: "`deadline_exceeded`: not done within the time limit",
}


class ErrorBody(BaseModel):
    """``code`` is stable, ``message`` is for people, ``field`` names the part of the request to change."""

    code: str
    message: str
    field: str | None = None


class ErrorResponse(BaseModel):
    """The one shape of every answer that is not a success."""

    error: ErrorBody


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of errors by status, each with its stable codes."""
    return {status: {"description": _ERRORS[status], "model": ErrorResponse} for status in (401, 403, *statuses)}


def documented_images(
    about: str, model: type[BaseModel], content: dict[str, Any], *statuses: int
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of images as JSON, as events, or as further ``content``; and of errors."""
    names = {"type": "string", "enum": [STEP, PARTIAL_IMAGE, COMPLETED, ERROR]}
    data = {"type": "string", "contentMediaType": "application/json"}
    event = {"type": "object", "properties": {"event": names, "data": data}, "required": ["event", "data"]}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}
    # OpenAPI 3.2 calls the schema of one event itemSchema.
    content = content | {EVENT_STREAM: {"itemSchema": event}}
    return documented(*statuses) | {200: {"description": about, "model": model, "content": content, "headers": headers}}


# What a route sends as events: names and JSON objects, of a step or a preview (None for nothing), and of a success.
Progress = Callable[[Event], tuple[str, bytes] | None]
Completed = Callable[[Result], Iterable[tuple[str, bytes]]]
BodySchema = Callable[[ModelInfo], dict[str, Any]]


@lru_cache(maxsize=2)
def classes_of(model: ModelInfo) -> ClassIndex:
    """The class names of a model, to search in."""
    return ClassIndex(model.class_names, model.num_classes)


class Service:
    """The pool as the routes see it. Routers register the JSON schemas of their bodies in ``body_schemas``."""

    def __init__(
        self, pool: Pool, settings: Settings, telemetry: Telemetry | None = None, keys: KeyStore | None = None
    ) -> None:
        self.pool, self.settings = pool, settings
        self._telemetry, self._keys = telemetry, keys
        self.cache = Cache(settings.cache_bytes, pool.metrics)
        pool.metrics.watch("cache_bytes", lambda: self.cache.size)
        self.body_schemas: dict[str, BodySchema] = {}  # by path, for the OpenAPI document

    @property
    def model(self) -> ModelInfo:
        """The model that is served now; read it once for each request, since it may be swapped."""
        return self.pool.model

    def model_to_run(self) -> ModelInfo:
        """:attr:`model` for a request of images, which counts as rejected if there is none yet."""
        try:
            return self.model
        except NotReady as error:
            self.pool.metrics.rejected.labels(error.status).inc()
            raise

    @property
    def status(self) -> str:
        """The pool's, or ``keys_unreadable`` while all requests are rejected for that."""
        status = self.pool.status
        return "keys_unreadable" if status == "ready" and self._keys is not None and self._keys.closed else status

    def timeout(self, asked_s: float | None) -> float:
        """The time limit in seconds of a request that asks for ``asked_s``, or for none; 422 for more than allowed."""
        most = self.settings.request_timeout_s
        if asked_s is not None and asked_s > most:
            raise invalid("timeout_s", f"timeout_s must be a number from {MIN_TIMEOUT_S:g} to {most:g}")
        return most if asked_s is None else asked_s

    def submit(self, http: HttpRequest, request: Request) -> None:
        """Queue ``request`` within the budget of the client's key, unless its images are there or in progress."""
        request.client, request.request_id = client_of(http.scope), current_request_id.get()
        if not self.cache.find(request):
            with image_budget(http, request.num_images):
                self.pool.submit(request)
            self.cache.follow(request)
        if self._telemetry is not None:
            self._telemetry.follow(request)

    async def result(self, http: HttpRequest, request: Request) -> Result:
        """Queue ``request`` and wait for its result; a client that disconnects cancels. The body must have been
        read."""
        self.submit(http, request)
        if request.future.done():  # from the cache
            return request.future.result()
        waiter = _Waiter(http, request)
        try:
            await waiter.wait(request.future, float("inf"))
            return request.future.result()
        finally:
            waiter.leave()

    async def stream(
        self,
        http: HttpRequest,
        request: Request,
        progress: Progress,
        completed: Completed,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Queue ``request`` and send its events until its end; a client that disconnects cancels.

        The answer begins with the first event or heartbeat: what fails earlier is an error as of any other request.
        """
        self.submit(http, request)
        waiter, buffer = _Waiter(http, request), request.subscribe()
        try:
            await waiter.wait_for_event(buffer)
            if request.future.done():
                request.future.result()
        except BaseException:
            waiter.leave()
            raise
        return _EventStream(waiter, buffer, progress, completed, {**headers_of(request), **(headers or {})})


class _Waiter:
    """A client that waits for a request: until it disconnects, or its time limit has passed."""

    def __init__(self, http: HttpRequest, request: Request) -> None:
        self.http, self.request = http, request
        self._ends_at = asyncio.get_running_loop().time() + request.timeout_s
        self._reason: CancelReason = "cancelled"
        self._gone = asyncio.ensure_future(self._disconnected())
        request.join()

    async def _disconnected(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass

    async def wait(self, future: asyncio.Future[Any], most_s: float) -> None:
        """Return when ``future`` is done, or ``most_s`` have passed; raise when the client has no more patience."""
        left_s = max(0.0, self._ends_at - asyncio.get_running_loop().time())
        await asyncio.wait((future, self._gone), timeout=min(left_s, most_s), return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return
        if self._gone.done():
            raise closed_by_client()
        if left_s <= most_s:
            self._reason = "timeout"
            raise ApiError(504, "deadline_exceeded", f"not done within {self.request.timeout_s:g} s")

    async def wait_for_event(self, buffer: EventBuffer) -> None:
        """As :meth:`wait`, for an event, and no longer than until a heartbeat is due."""
        event = asyncio.ensure_future(buffer.wait())
        try:
            await self.wait(event, HEARTBEAT_S)
        finally:
            event.cancel()

    def leave(self) -> None:
        self._gone.cancel()
        self.request.leave(self._reason)


def headers_of(request: Request, timings: Timings | None = None) -> dict[str, str]:
    """Headers of an answer with images; of a stream without times, which come at its end. Seconds."""
    headers = {"X-Seed": str(request.seed)}
    if request.source:
        headers[CACHE_HEADER] = request.source
    for name in ("queue", "inference", "total") if timings is not None else ():
        headers[f"x-{name}-time"] = f"{getattr(timings, name + '_s'):.6f}"
    return headers


class Parts(Response):
    """An answer of several pieces of bytes; a long one leaves them apart, and lets other requests in between."""

    def __init__(self, parts: Sequence[bytes], media_type: str, headers: Mapping[str, str]) -> None:
        length = sum(map(len, parts))
        self._parts = [b"".join(parts)] if length <= _ONE_PART_BYTES else list(parts)
        super().__init__(None, media_type=media_type, headers={**headers, "content-length": str(length)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        *parts, last = self._parts
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": last})


def json_parts(name: str, texts: Sequence[bytes], fields: Mapping[str, Any]) -> list[bytes]:
    """A JSON object with a list of base64 strings under ``name``, and ``fields`` after it; the texts are not copied."""
    parts = [f'{{"{name}":["'.encode()]
    for i, text in enumerate(texts):
        parts += [b'","', text] if i else [text]
    return [*parts, b'"],' + to_json(fields)[1:]]


class _EventStream(Response):
    """Server-sent events of one request. Its waiter leaves however it ends."""

    media_type = EVENT_STREAM

    def __init__(
        self,
        waiter: _Waiter,
        buffer: EventBuffer,
        progress: Progress,
        completed: Completed,
        headers: Mapping[str, str],
    ) -> None:
        # nginx would collect events until its buffer is full.
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._waiter, self._buffer, self._progress, self._completed = waiter, buffer, progress, completed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events():
                    await write(event)
            except Exception as error:
                failure = as_api_error(error)
                if failure is None:
                    raise
                await write(_sse(ERROR, failure.body(scope["path"])))
            await write(b"", more=False)
        except OSError:  # the connection has closed
            pass
        finally:
            self._waiter.leave()

    async def _events(self) -> AsyncIterator[bytes]:
        future = self._waiter.request.future
        while True:
            ended = future.done()  # asked before the events are taken, so that none of them is lost
            for event in self._buffer.take():
                if (named := self._progress(event)) is not None:
                    yield _sse(*named)
            if ended:
                break
            await self._waiter.wait_for_event(self._buffer)
            if not self._buffer.is_set():
                yield b": ping\n\n"
        for named in self._completed(future.result()):
            yield _sse(*named)


def _sse(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
