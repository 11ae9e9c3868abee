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
    leaving_at: float = 0.0  # when its last step began; 0: it has more of them


class RemoteWorker(asyncio.Protocol):
    """The server's end of one worker process: what it has been given, what it reports, whether it hangs."""

    def __init__(self, fleet: Fleet, number: int, handle: Handle) -> None:
        self.pool, self.fleet, self.number, self.handle = fleet.pool, fleet, number, handle
        self.phase: Literal["new", "loading", "warming", "ready", "dead"] = "new"
        self.budget = self.pool.settings.max_batch_rows
        self.rows_per_s = 0.0
        self.gpu_memory: list[int] | None = None
        self.rows = 0  # of the model, of the images that have a step to make after the current one
        self.sent: dict[int, SentImage] = {}
        self.decoding: dict[int, None] = {}  # of these, those without a step to make, the oldest first
        self.heard_at = self.pool.clock()  # or when it began to have something to do
        self._unpacker = Unpacker()
        self._outbox: list[dict[str, Any]] = []
        self.transport: asyncio.Transport | None = None

    # What the pool does with it.

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        self.handle.sock.setblocking(False)
        await loop.create_connection(lambda: self, sock=self.handle.sock)

    def load(self, *, store: bool) -> None:
        """Tell it to load; ``store``: from the checkpoint, whose content it puts into the memory file."""
        settings = self.pool.settings
        self.phase, self.heard_at = "loading", self.pool.clock()
        options = {
            "op": "load",
            "checkpoint": None if self.fleet.checkpoint is None else str(self.fleet.checkpoint),
            "decoder": None if settings.decoder is None else str(settings.decoder),
            "backend": settings.backend,
            "threads": settings.threads,
            "number": self.number,
            "replicas": settings.replicas,
            "max_batch_rows": settings.max_batch_rows,
            "target_step_s": settings.target_step_s,
            "decode_threads": settings.decode_threads,
            "embed_settings": settings.embed_settings,
            "store": store,
        }
        self._write(options)

    def has_room(self, rows: int) -> bool:
        """Whether an image of ``rows`` rows may join its next step; any may where nothing else is."""
        if self.phase != "ready" or len(self.decoding) >= 2 * self.pool.settings.max_batch_rows:
            return False
        return self.rows + rows <= self.budget or not self.rows

    def give(self, request: Request, image: int) -> None:
        """An image to step, once :meth:`flush` is called."""
        if not self.sent:
            self.heard_at = self.pool.clock()
        number = next(self.pool.numbers)
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
        if self._outbox:
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
        settings, silent_s = self.pool.settings, now - self.heard_at
        if self.phase == "loading":
            return "loading" if silent_s > settings.load_timeout_s else ""
        busy = self.phase == "warming" or (self.phase == "ready" and self.sent)
        if busy and silent_s > settings.stall_timeout_s:
            return "a forward" if self.phase == "warming" or self.rows else "a step or a decoder"
        oldest = next(iter(self.decoding), None)
        if oldest is not None and now - self.sent[oldest].leaving_at > settings.stall_timeout_s:
            return "a decoder"
        return ""

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
        self.heard_at = self.pool.clock()
        for head, body in self._unpacker.feed(data):
            getattr(self, f"_on_{head['op']}")(head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.phase != "dead":
            self.fleet.lost(self, "")

    def _on_loaded(self, head: dict[str, Any], _: bytes) -> None:
        self.phase = "warming"
        model = head["model"]
        model["class_names"] = tuple(model["class_names"])
        model["path"], model["defaults"] = Path(model["path"]), SamplerConfig(**model["defaults"])
        self.fleet.loaded(ModelInfo(**model))

    def _on_warming(self, head: dict[str, Any], _: bytes) -> None:
        pass

    _on_alive = _on_warming

    def _on_ready(self, head: dict[str, Any], _: bytes) -> None:
        self.phase = "ready"
        self._on_speed(head)
        self.fleet.warmed_up(self)

    def _on_failed(self, head: dict[str, Any], _: bytes) -> None:
        error = LoadFailed(head["message"]) if head["kind"] == "user" else RunFailed(head["message"])
        self.fleet.lost(self, "failed", error)

    def _on_speed(self, head: dict[str, Any]) -> None:
        self.budget, self.rows_per_s = head["budget"], head["rows_per_s"]
        self.gpu_memory = head.get("gpu", self.gpu_memory)

    def _on_step(self, head: dict[str, Any], _: bytes) -> None:
        metrics, sent = self.pool.metrics, self.sent
        for rows, seconds in head.get("measured", ()):
            metrics.observe_step(rows, seconds)
        if "budget" in head:
            self._on_speed(head)
        for number in head.get("first", ()):
            if number in sent:
                self.pool.first_step(sent[number].request, head["began"], head["ended"])
        for number, steps_done in head.get("progress", ()):
            if number in sent:
                image = sent[number]
                steps = image.request.specs[image.image].steps
                image.request.publish(Event(image.image, steps_done, steps))
        for number in head["leaving"]:
            if number in sent and not sent[number].leaving_at:
                sent[number].leaving_at = self.heard_at
                self.decoding[number] = None
                self.rows -= sent[number].request.rows_per_image
        self.fleet.dispatch()

    def _on_image(self, head: dict[str, Any], body: bytes) -> None:
        sent = self._forget(head["id"])
        if sent is not None:
            self.pool.metrics.decode_duration.observe(head["decode_s"])
            self.pool.finished(sent.request, sent.image, body, head["first"], head["last"])
        self.fleet.dispatch()

    def _on_preview(self, head: dict[str, Any], body: bytes) -> None:
        sent = self.sent.get(head["id"])
        if sent is not None:
            steps = sent.request.specs[sent.image].steps
            sent.request.publish(Event(sent.image, head["steps_done"], steps, body))

    def _on_fault(self, head: dict[str, Any], _: bytes) -> None:
        sent = self.sent.get(head["id"])
        if sent is not None:
            self.pool.fail(sent.request, "error", GenerationFailed("the model failed on this request"))
        self.fleet.dispatch()

    def _forget(self, number: int) -> SentImage | None:
        sent = self.sent.pop(number, None)
        if sent is not None and number in self.decoding:
            del self.decoding[number]
        elif sent is not None:
            self.rows -= sent.request.rows_per_image
        return sent

    def _write(self, head: dict[str, Any]) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(pack(head))
