"""The loop that owns the model. Knows no HTTP; reaches the model through :mod:`server.engine.model` alone."""

from server.engine.errors import EngineError, GenerationFailed, NotReady, Overloaded
from server.engine.images import IMAGE_FORMATS, ImageFormat
from server.engine.job import Job, Result, Timings
from server.engine.loop import Engine

__all__ = [
    "IMAGE_FORMATS",
    "Engine",
    "EngineError",
    "GenerationFailed",
    "ImageFormat",
    "Job",
    "NotReady",
    "Overloaded",
    "Result",
    "Timings",
]
