"""The server's end of one worker process. The event loop owns it; :class:`server.fleet.Fleet` decides what it gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from robuq_core.config import SamplerConfig
from robuq_core.errors import UserError
from server.launch import Handle, Unpacker, pack
from server.request import Event, GenerationFailed, ModelInfo, Request

if TYPE_CHECKING:
    from server.fleet import Fleet


class LoadFailed(UserError):
    """A checkpoint cannot be loaded."""


class RunFailed(Exception):
    """A checkpoint loads but does not run, or its workers died."""


@dataclass(slots=True)
class SentImage:
    """An image that a worker has."""

    request: Request
    image: int
    leaving_at: float = 0.0  # when its last step began, or the image before it was done; 0: it has more steps


class RemoteWorker(asyncio.Protocol):
    """What one worker has been given, what it reports, whether it hangs."""

    def __init__(self, fleet: Fleet, number: int, handle: Handle) -> None:
        self.fleet, self.number, self.handle = fleet, number, handle
        self.settings, self.clock = fleet.pool.settings, fleet.pool.clock
        self.phase: Literal["new", "loading", "warming", "ready", "dead"] = "new"
        self.budget = self.settings.max_batch_rows
        self.rows_per_s = 0.0
        self.gpu_memory: list[int] | None = None
        self.rows = 0  # of the model, of the images that have a step to make after the current one
        self.sent: dict[int, SentImage] = {}
        self.decoding: dict[int, None] = {}  # of these, those without a step to make, the oldest first
        self.heard_at = self.clock()  # or when it began to have something to do
        self._unpacker = Unpacker()
        self._outbox: list[dict[str, Any]] = []
        self.transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        self.handle.sock.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=self.handle.sock)

    def load(self, *, store: bool) -> None:
        """Tell it to load; ``store``: from the checkpoint, whose content it puts into the memory file."""
        self.phase, self.heard_at = "loading", self.clock()
        checkpoint = self.fleet.checkpoint
        given = {"checkpoint": checkpoint and str(checkpoint), "number": self.number, "store": store}
        self._write({"op": "load", **self.settings.model_dump(mode="json"), **given})

    def has_room(self, rows: int) -> bool:
        """Whether an image of ``rows`` rows may join its next step; any may where nothing else is."""
        if self.phase != "ready" or len(self.decoding) >= 2 * self.settings.max_batch_rows:
            return False
        return self.rows + rows <= self.budget or not self.rows

    def give(self, request: Request, image: int) -> None:
        """An image to step, once :meth:`flush` is called."""
        if not self.sent:
            self.heard_at = self.clock()
        number = next(self.fleet.pool.numbers)
        self.sent[number] = SentImage(request, image)
        self.rows += request.rows_per_image
        self._outbox.append(
            {
                "id": number,
                "spec": vars(request.specs[image]),
                "image_format": request.image_format,
                "as_base64": request.as_base64,
                "watched": request.watched,
                "preview_every": request.preview_every if request.watched else 0,
                "request_id": request.request_id,
            }
        )

    def flush(self) -> None:
        """Send what :meth:`give` has collected."""
        self._write({"op": "images", "images": self._outbox})
        self._outbox = []

    def drop(self, request: Request) -> None:
        """Forget the images of a request; what runs of it is gone at the next step."""
        numbers = [number for number, sent in self.sent.items() if sent.request is request]
        for number in numbers:
            self._forget(number)
        if numbers and self.phase == "ready":
            self._write({"op": "cancel", "ids": numbers})

    def hung(self, now: float) -> str:
        """What hangs in it, or nothing."""
        limit_s, silent_s = self.settings.stall_timeout_s, now - self.heard_at
        if self.phase == "loading":
            return "loading" if silent_s > self.settings.load_timeout_s else ""
        busy = self.phase == "warming" or (self.phase == "ready" and self.sent)
        if busy and silent_s > limit_s:
            return "a forward" if self.phase == "warming" or self.rows else "a step or a decoder"
        oldest = next(iter(self.decoding), None)
        return "a decoder" if oldest is not None and now - self.sent[oldest].leaving_at > limit_s else ""

    def close(self) -> None:
        """End it: it notices that the socket has closed."""
        self.phase = "dead"
        if self.transport is None:
            self.handle.sock.close()
        else:
            self.transport.abort()

    # What it sends.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.phase == "dead":
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.phase == "dead":
            return
        self.heard_at = self.clock()
        for head, body in self._unpacker.feed(data):
            self._take(head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.phase != "dead":
            self.fleet.lost(self, "")

    def _take(self, head: dict[str, Any], body: bytes) -> None:
        match head["op"]:
            case "loaded":
                self.phase = "warming"
                model = head["model"]
                model["class_names"] = tuple(model["class_names"])
                model["path"], model["defaults"] = Path(model["path"]), SamplerConfig(**model["defaults"])
                self.fleet.loaded(ModelInfo(**model))
            case "ready":
                self.phase = "ready"
                self._note_speed(head)
                self.fleet.warmed_up(self)
            case "failed":
                kind = LoadFailed if head["kind"] == "user" else RunFailed
                self.fleet.lost(self, "failed", kind(head["message"]))
            case "step":
                self._note_step(head)
                self.fleet.dispatch()
            case "preview" if (sent := self.sent.get(head["id"])) is not None:
                self._publish(sent, head["steps_done"], body)
            case "image":
                if (sent := self._forget(head["id"])) is not None:
                    self.fleet.finished(sent.request, sent.image, body, head)
                self.fleet.dispatch()
            case "fault":
                if (sent := self.sent.get(head["id"])) is not None:
                    self.fleet.fail(sent.request, "error", GenerationFailed("the model failed on this request"))
                self.fleet.dispatch()

    def _note_speed(self, head: dict[str, Any]) -> None:
        self.budget, self.rows_per_s = head["budget"], head["rows_per_s"]
        self.gpu_memory = head.get("gpu", self.gpu_memory)

    def _note_step(self, head: dict[str, Any]) -> None:
        sent = self.sent
        for rows, seconds in head.get("measured", ()):
            self.fleet.pool.metrics.observe_step(rows, seconds)
        if "budget" in head:
            self._note_speed(head)
        for number in head.get("first", ()):
            if number in sent:
                self.fleet.first_step(sent[number].request, head["began"], head["ended"])
        for number, steps_done in head.get("progress", ()):
            if number in sent:
                self._publish(sent[number], steps_done)
        for number in head["leaving"]:
            if number in sent and not sent[number].leaving_at:
                sent[number].leaving_at = self.heard_at
                self.decoding[number] = None
                self.rows -= sent[number].request.rows_per_image

    def _publish(self, sent: SentImage, steps_done: int, preview: bytes = b"") -> None:
        sent.request.publish(Event(sent.image, steps_done, sent.request.specs[sent.image].steps, preview))

    def _forget(self, number: int) -> SentImage | None:
        sent = self.sent.pop(number, None)
        if sent is not None and number in self.decoding:
            was_oldest = number == next(iter(self.decoding))
            del self.decoding[number]
            if was_oldest and self.decoding:  # waiting for a decoder is no sign of a hang
                self.sent[next(iter(self.decoding))].leaving_at = self.heard_at
        elif sent is not None:
            self.rows -= sent.request.rows_per_image
        return sent

    def _write(self, head: dict[str, Any]) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(pack(head))
