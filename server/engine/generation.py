"""The samplers of one checkpoint, one a replica. A hot swap puts the next generation in front of the present one."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.model import StepSampler
from server.scheduler import StepTimeCurve


class Generation:
    """What requests are bound to when they are submitted. The engine's lock guards all but the samplers' own calls."""

    def __init__(self, samplers: Sequence[StepSampler]) -> None:
        self.samplers = tuple(samplers)
        self.curves = tuple(StepTimeCurve() for _ in self.samplers)
        self.jobs = 0  # requests in flight
        self.retired_at: float | None = None  # since when another one takes the new requests

    def release(self) -> None:
        """Let the samplers go, whoever still holds an old job."""
        self.samplers = ()
