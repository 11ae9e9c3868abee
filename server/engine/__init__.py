"""The loop that owns the model. Knows no HTTP; reaches the model through :mod:`server.engine.model` alone."""

from server.engine.engine import Engine
from server.engine.errors import Cancelled, DeadlineExceeded, EngineError, GenerationFailed, NotReady, Overloaded
from server.engine.events import Event, EventSink, Preview, StepDone
from server.engine.images import IMAGE_FORMATS, ImageFormat
from server.engine.job import CancelReason, Job, Result, Timings

__all__ = [
    "IMAGE_FORMATS",
    "CancelReason",
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "EngineError",
    "Event",
    "EventSink",
    "GenerationFailed",
    "ImageFormat",
    "Job",
    "NotReady",
    "Overloaded",
    "Preview",
    "Result",
    "StepDone",
    "Timings",
]
