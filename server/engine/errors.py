"""What a request can meet in the engine, each with the data that an answer needs."""

from __future__ import annotations


class EngineError(Exception):
    """Base of the engine's refusals and failures."""


class Overloaded(EngineError):
    """The queue is full; room for this request is expected in ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class NotReady(EngineError):
    """The engine takes no requests now. ``status``: starting, draining, stalled, failed or stopped."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the engine is {status}")
        self.status = status


class GenerationFailed(EngineError):
    """The model, the decoder or the encoder raised on this request. The cause is in the log, not in the answer."""


class Cancelled(EngineError):
    """The request was given up by its client or ran out of time."""


class DeadlineExceeded(EngineError):
    """The request was not done by its deadline."""
