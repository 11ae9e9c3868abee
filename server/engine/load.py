"""How busy an engine is, as one consistent snapshot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """``rows`` of the model are in its next step, of ``row_budget`` at most; ``stalled``: a forward takes too long."""

    rows: int
    row_budget: int
    stalled: bool


@dataclass(frozen=True)
class Load:
    """Requests run when at least one of their images does; decoding images and previews are neither waiting nor run."""

    status: str
    requests_running: int
    requests_waiting: int
    images_in_flight: int
    images_waiting: int
    images_decoding: int
    replicas: tuple[ReplicaLoad, ...]
