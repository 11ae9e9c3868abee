"""What operators' machines ask: is it alive, does it take requests, how is it doing."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.intake import Intake
from server.api.schemas import StatusResponse


def operations_router(intake: Intake) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter()
    engine = intake.engine

    @router.get("/health", responses={503: {"model": StatusResponse, "description": "restart the process"}})
    async def health(response: Response) -> StatusResponse:
        """Liveness: 200 as long as the process can still come to serve; 503 asks for a restart."""
        status = engine.status
        if status in ("failed", "stopped"):
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/ready", responses={503: {"model": StatusResponse, "description": "send no requests here"}})
    async def ready(response: Response) -> StatusResponse:
        """Readiness: 200 after warm-up, 503 while starting, stalled or draining, or without readable API keys."""
        status = intake.status
        if status != "ready":
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
