"""One order on its way through the engine, and all who wait for it: the last to go takes its rows along."""

from __future__ import annotations

import asyncio
import contextlib
import threading

from fastapi import Request

from server.api.errors import ApiError, closed_by_client
from server.api.order import Order
from server.engine import Cancelled, DeadlineExceeded, Engine, Result
from server.engine.events import Event, Preview
from server.engine.model import StepSampler
from server.logs import current_request_id

# The engine keeps deadlines between its steps; a step that hangs must not hold the client beyond this.
DEADLINE_GRACE_S = 0.25


class EventBuffer:
    """The latest progress and the latest preview of each image until they are taken: a slow client skips some.

    :meth:`put` may be called from any thread, the rest from the event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()
        self._latest: dict[tuple[int, bool], Event] = {}

    def put(self, event: Event) -> None:
        key = (event.image, isinstance(event, Preview))
        with self._lock:
            was_empty = not self._latest
            self._latest.pop(key, None)  # so that it moves to the end
            self._latest[key] = event
        if was_empty:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._wake.set)

    def wake(self) -> None:
        """Let :meth:`wait` return although there is no event."""
        self._wake.set()

    async def wait(self) -> None:
        """Return when there is something to take."""
        await self._wake.wait()

    def take(self) -> list[Event]:
        """Every event since the last call, in order."""
        self._wake.clear()
        with self._lock:
            events = list(self._latest.values())
            self._latest.clear()
        return events


class Generation:
    """An order that the engine has taken. The event loop owns it.

    Whoever waits for :attr:`outcome` calls :meth:`join` before and :meth:`leave` after.

    Raises:
        NotReady, Overloaded: the engine has not taken it.
    """

    replayed = False

    def __init__(self, engine: Engine, order: Order, sampler: StepSampler, client: str) -> None:
        self.order = order
        self._engine = engine
        self._waiting = 0
        self._buffers: tuple[EventBuffer, ...] = ()
        self.job = engine.submit(
            order.specs,
            order.image_format,
            request_id=current_request_id.get(),
            client=client,
            priority=order.priority,
            timeout_s=order.timeout_s,
            preview_every=order.preview_every,
            on_event=self._publish if order.watched else None,
            sampler=sampler,
        )
        self.outcome: asyncio.Future[Result] = asyncio.wrap_future(self.job.future)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(order.timeout_s + DEADLINE_GRACE_S, engine.cancel, self.job, "timeout")
        self.outcome.add_done_callback(self._settled)

    def join(self) -> None:
        """One more waits for the outcome."""
        self._waiting += 1

    def leave(self) -> None:
        """One waits no more; the rows do not outlive the last."""
        self._waiting -= 1
        if not self._waiting and not self.outcome.done():
            self.outcome.cancel()
            self._engine.cancel(self.job)

    def subscribe(self) -> EventBuffer:
        """The events from now on; the buffer wakes at the outcome, too."""
        buffer = EventBuffer()
        self._buffers = (*self._buffers, buffer)
        self.outcome.add_done_callback(lambda _: buffer.wake())
        return buffer

    def result(self) -> Result:
        """The outcome, which must be done.

        Raises:
            ApiError: 504. GenerationFailed, NotReady: what the engine met.
        """
        try:
            return self.outcome.result()
        except (DeadlineExceeded, Cancelled):
            raise ApiError(504, "deadline_exceeded", f"not done within {self.order.timeout_s:g} s") from None

    async def wait(self, request: Request) -> Result:
        """The result, for a client that gets nothing before it. The body of ``request`` must have been read."""
        if self.outcome.done():
            return self.result()
        self.join()
        gone: asyncio.Future[None] = asyncio.ensure_future(client_gone(request))
        try:
            await asyncio.wait((self.outcome, gone), return_when=asyncio.FIRST_COMPLETED)
            if not self.outcome.done():
                raise closed_by_client()
            return self.result()
        finally:
            gone.cancel()
            self.leave()

    def _publish(self, event: Event) -> None:
        for buffer in self._buffers:
            buffer.put(event)

    def _settled(self, outcome: asyncio.Future[Result]) -> None:
        self._timer.cancel()
        if not outcome.cancelled():
            outcome.exception()  # looked at here, since everybody may have left by now


class Replay(Generation):
    """An order that has been answered before."""

    replayed = True

    def __init__(self, order: Order, result: Result) -> None:
        self.order = order
        self._waiting = 0
        self._buffers = ()
        self.outcome = asyncio.get_running_loop().create_future()
        self.outcome.set_result(result)


async def client_gone(request: Request) -> None:
    """Return when the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
