"""What the API knows of a model, derived once a sampler: a hot swap changes the engine's sampler under it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from robuq_core.config import SamplerConfig
from server.api.classes import ClassIndex
from server.api.schemas import request_schema
from server.engine.model import StepSampler


@dataclass(frozen=True)
class Model:
    """Tables of one sampler. They do not hold the sampler itself, so that its memory goes when it is swapped out.

    ``name`` is that of its checkpoint; ``size`` is ``"WxH"``; ``schema`` is the JSON schema of ``POST /generate``;
    ``created`` is when the server first met it, in seconds since 1970.
    """

    name: str
    num_classes: int
    size: str
    defaults: SamplerConfig
    classes: ClassIndex
    schema: dict[str, Any]
    created: int


class Catalog:
    """The tables of every sampler that is alive. Not thread-safe: the event loop owns it.

    Args:
        max_timeout_s: most that a request may ask for as its ``timeout_s``.
    """

    def __init__(self, max_timeout_s: float) -> None:
        self._max_timeout_s = max_timeout_s
        self._models: WeakKeyDictionary[StepSampler, Model] = WeakKeyDictionary()

    def of(self, sampler: StepSampler) -> Model:
        """The tables of ``sampler``, made at the first call."""
        model = self._models.get(sampler)
        if model is None:
            model = self._models[sampler] = Model(
                name=sampler.checkpoint_name,
                num_classes=sampler.num_classes,
                size=f"{sampler.image_size}x{sampler.image_size}",
                defaults=sampler.defaults,
                classes=ClassIndex(sampler.class_names, sampler.num_classes),
                schema=request_schema(sampler.num_classes, self._max_timeout_s),
                created=int(time.time()),
            )
        return model
