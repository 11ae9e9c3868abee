"""What a client asks before it draws: what is served, which classes there are, how long the queue is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

import robuq_core
from robuq_core.config import samplers_of
from server.api.intake import Intake
from server.api.responses import documented
from server.api.schemas import (
    ClassesResponse,
    ClassItem,
    DecoderSchema,
    DefaultsSchema,
    InfoResponse,
    LimitsSchema,
    PrioritiesSchema,
    QueueResponse,
)
from server.engine import Engine
from server.settings import MAX_IMAGES, Settings

MAX_QUERY = 200


def describe(engine: Engine, settings: Settings) -> InfoResponse:
    """The server and the model that it serves now."""
    sampler = engine.sampler
    features = ["streaming", "previews", "priorities", "deadlines", "openai", "kserve_v2"]
    if settings.idempotency_ttl_s:
        features.append("idempotency")
    if settings.api_keys_file is not None:
        features.append("api_keys")
    if settings.otel_endpoint is not None:
        features.append("opentelemetry")
    return InfoResponse(
        version=robuq_core.__version__,
        checkpoint=sampler.checkpoint_name,
        backend=sampler.backend_name,
        average_activation_bits=sampler.average_activation_bits,
        weight_bytes=sampler.weight_bytes,
        decoder=DecoderSchema(name=sampler.decoder.name, weight_bytes=sampler.decoder.weight_bytes),
        image_size=sampler.image_size,
        num_classes=sampler.num_classes,
        prediction_type=sampler.prediction_type,
        guidance=sampler.can_guide,
        replicas=len(engine.load().replicas),
        features=features,
        samplers=list(samplers_of(sampler.prediction_type)),
        defaults=DefaultsSchema(**sampler.defaults.model_dump()),
        priorities=PrioritiesSchema(ageing_s=settings.priority_ageing_s),
        limits=LimitsSchema(
            max_images_per_request=MAX_IMAGES,
            max_batch_rows=settings.max_batch_rows,
            max_queue_images=settings.max_queue_images,
            request_timeout_s=settings.request_timeout_s,
            max_body_bytes=settings.max_body_bytes,
        ),
    )


def discovery_router(intake: Intake) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter(responses=documented())
    engine, settings = intake.engine, intake.settings

    @router.get("/info")
    async def get_info() -> InfoResponse:
        """The server, its model, its defaults and its limits."""
        return describe(engine, settings)

    @router.get("/classes", responses=documented(422))
    async def get_classes(
        query: Annotated[str, Query(max_length=MAX_QUERY, description="A part of a name, or an id.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="Most classes to tell.")] = 20,
    ) -> ClassesResponse:
        """Classes that `query` may mean, the best first; without it, all of them in order of their ids.

        First come the id itself, a whole name, the beginning of a name, of a word, any part of one; if no name holds
        the query, those that are spelt much like it.
        """
        classes = intake.model.classes
        found = classes.search(query, limit)
        return ClassesResponse(classes=[ClassItem(id=i, name=classes.name(i)) for i in found])

    @router.get("/queue")
    async def get_queue() -> QueueResponse:
        """What runs and what waits now."""
        return QueueResponse(**asdict(engine.load()))

    return router
