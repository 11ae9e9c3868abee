"""What operators and their machines ask: is it alive, does it take requests, what is it, how is it doing."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

import robuq_core
from server.api.schemas import DefaultsSchema, InfoResponse, LimitsSchema, StatusResponse
from server.engine import Engine
from server.settings import MAX_IMAGES, Settings


def describe(engine: Engine, settings: Settings) -> InfoResponse:
    """The server and the model that it serves now."""
    sampler = engine.sampler
    return InfoResponse(
        version=robuq_core.__version__,
        checkpoint=sampler.checkpoint_name,
        backend=sampler.backend_name,
        average_activation_bits=sampler.average_activation_bits,
        weight_bytes=sampler.weight_bytes,
        image_size=sampler.image_size,
        num_classes=sampler.num_classes,
        defaults=DefaultsSchema(**sampler.defaults.model_dump()),
        limits=LimitsSchema(
            max_images_per_request=MAX_IMAGES,
            max_batch_rows=settings.max_batch_rows,
            max_queue_images=settings.max_queue_images,
            request_timeout_s=settings.request_timeout_s,
            max_body_bytes=settings.max_body_bytes,
        ),
    )


def operations_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter()

    @router.get("/health", responses={503: {"model": StatusResponse, "description": "restart the process"}})
    async def health(response: Response) -> StatusResponse:
        """Liveness: 200 as long as the process can still come to serve; 503 asks for a restart."""
        status = engine.status
        if status in ("failed", "stopped"):
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/ready", responses={503: {"model": StatusResponse, "description": "send no requests here"}})
    async def ready(response: Response) -> StatusResponse:
        """Readiness: 200 after warm-up, 503 while starting, stalled or draining."""
        status = engine.status
        if status != "ready":
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/info")
    async def get_info() -> InfoResponse:
        """The server, its model, its defaults and its limits."""
        return describe(engine, settings)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
