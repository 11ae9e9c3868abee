"""What the API knows of a model, derived once a sampler: a hot swap changes the engine's sampler under it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from robuq_core.config import PredictionType, SamplerConfig
from server.api.classes import ClassIndex
from server.api.openai_schemas import openai_schema
from server.api.schemas import request_schema
from server.engine.model import StepSampler


@dataclass(frozen=True)
class Model:
    """Tables of one sampler. They do not hold the sampler itself, so that its memory goes when it is swapped out.

    ``name`` is that of its checkpoint; ``size`` is ``"WxH"``; the schemas are of the bodies of
    ``POST /generate`` and ``POST /v1/images/generations``; ``created`` is when the server first met the model, in
    seconds since 1970.
    """

    name: str
    num_classes: int
    prediction_type: PredictionType
    can_guide: bool
    size: str
    defaults: SamplerConfig
    classes: ClassIndex
    schema: dict[str, Any]
    openai_schema: dict[str, Any]
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
            name, size = sampler.checkpoint_name, f"{sampler.image_size}x{sampler.image_size}"
            model = self._models[sampler] = Model(
                name=name,
                num_classes=sampler.num_classes,
                prediction_type=sampler.prediction_type,
                can_guide=sampler.can_guide,
                size=size,
                defaults=sampler.defaults,
                classes=ClassIndex(sampler.class_names, sampler.num_classes),
                schema=request_schema(sampler.num_classes, sampler.prediction_type, self._max_timeout_s),
                openai_schema=openai_schema(name, size, self._max_timeout_s),
                created=int(time.time()),
            )
        return model
