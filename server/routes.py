"""Routes beside those that generate images: what is served, how it does, and for administrators the hot swap."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

import robuq_core
from robuq_core.config import PredictionType, SamplerConfig, SamplerName, samplers_of
from robuq_core.images import IMAGE_FORMATS, ImageFormat
from robuq_core.params import MAX_IMAGES, NullMeansAbsent, read_params
from server.access import client_of
from server.errors import ApiError, invalid
from server.pool import Load
from server.remote_worker import LoadFailed, RunFailed
from server.request import MAX_PRIORITY
from server.service import Service, classes_of, documented

logger = logging.getLogger(__name__)

MAX_QUERY = 200
SUFFIX = ".safetensors"
_FEATURES = ("streaming", "previews", "priorities", "deadlines", "openai", "idempotency")
_LIMITS = ("max_batch_rows", "max_queue_images", "request_timeout_s", "max_body_bytes")


class StatusResponse(BaseModel):
    """State of the server: starting, ready, restarting, draining, keys_unreadable, failed or stopped."""

    status: str


class ClassItem(BaseModel):
    """One class; the name is empty where the checkpoint has none for it."""

    id: int
    name: str


class ClassesResponse(BaseModel):
    classes: list[ClassItem]


class InfoResponse(BaseModel):
    """The server, its model, its defaults and its limits."""

    version: str = robuq_core.__version__
    checkpoint: str
    backend: str
    average_activation_bits: float
    weight_bytes: int = Field(description="Of the network, without the decoder.")
    decoder: dict[str, str | int] = Field(description="Its name, or pixels where there is none, and its weight_bytes.")
    image_size: int
    num_classes: int
    prediction_type: PredictionType
    guidance: bool = Field(description="Whether guidance_scale may be other than 1.")
    replicas: int
    features: list[str]
    samplers: list[SamplerName]
    formats: list[ImageFormat] = list(IMAGE_FORMATS)
    defaults: SamplerConfig
    priorities: dict[str, int | float] = Field(
        description="min, max and default of priority; a level weighs as much as ageing_s seconds of waiting."
    )
    limits: dict[str, int | float] = Field(description="Bounds that requests meet; times in seconds.")


class SwapBody(NullMeansAbsent):
    """Which file to serve from now on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"path": "v2.safetensors"}]})

    path: Annotated[str, Field(min_length=1, max_length=255, description="A file that GET /admin/checkpoint lists.")]


class CheckpointFile(BaseModel):
    """A file that could be served; whether it can shows when it is loaded."""

    path: str
    bytes: int
    modified: datetime


class CheckpointsResponse(BaseModel):
    """``served`` is the name of the checkpoint as in /info."""

    served: str
    files: list[CheckpointFile]


def describe(service: Service) -> InfoResponse:
    """The server and the model that it serves now.

    Raises:
        NotReady: no model has been loaded yet.
    """
    model, settings = service.model, service.settings
    optional = {
        "cache": settings.cache_bytes,
        "api_keys": settings.api_keys_file,
        "opentelemetry": settings.otel_endpoint,
    }
    known: dict[str, Any] = vars(model)
    return InfoResponse(
        **{name: known[name] for name in InfoResponse.model_fields if name in known},
        checkpoint=model.name,
        backend=model.backend_name,
        decoder={"name": model.decoder_name, "weight_bytes": model.decoder_weight_bytes},
        guidance=model.can_guide,
        replicas=settings.replicas,
        features=[*_FEATURES, *(name for name, on in optional.items() if on)],
        samplers=list(samplers_of(model.prediction_type)),
        priorities={"min": 0, "max": MAX_PRIORITY, "default": 0, "ageing_s": settings.priority_ageing_s},
        limits={"max_images_per_request": MAX_IMAGES} | {name: getattr(settings, name) for name in _LIMITS},
    )


def discovery_router(service: Service) -> APIRouter:
    router = APIRouter(responses=documented())

    @router.get("/info", responses=documented(503))
    async def get_info() -> InfoResponse:
        """The server, its model, its defaults and its limits."""
        return describe(service)

    @router.get("/classes", responses=documented(422, 503))
    async def get_classes(
        query: Annotated[str, Query(max_length=MAX_QUERY, description="A part of a name, or an id.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="Maximum number of classes.")] = 20,
    ) -> ClassesResponse:
        """Classes that `query` may mean, the best first; without it, all of them in order of their ids.

        First come the id itself, a whole name, the beginning of a name, of a word, any part of one; if no name holds
        the query, those that are spelt much like it.
        """
        classes = classes_of(service.model)
        found = classes.search(query, limit)
        return ClassesResponse(classes=[ClassItem(id=i, name=classes.name(i)) for i in found])

    @router.get("/queue")
    async def get_queue() -> Load:
        """What runs and what waits now."""
        return service.pool.load()

    return router


def operations_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: {"model": StatusResponse, "description": "restart the process"}})
    async def health(response: Response) -> StatusResponse:
        """Liveness: 200 as long as the process can still serve, whatever a worker does; 503 asks for a restart."""
        response.status_code = 503 if service.pool.ended else 200
        return StatusResponse(status=service.pool.status)

    @router.get("/ready", responses={503: {"model": StatusResponse, "description": "send no requests here"}})
    async def ready(response: Response) -> StatusResponse:
        """Readiness: 200 while a worker takes images; 503 while starting, restarting or draining, or without readable
        API keys."""
        status = service.status
        response.status_code = 200 if status == "ready" else 503
        return StatusResponse(status=status)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.pool.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def _checkpoints(folder: Path) -> list[CheckpointFile]:
    """Files of ``folder`` that could be loaded; none that a link leads out of it."""
    found = []
    for path in sorted(folder.glob("*" + SUFFIX)):
        with suppress(OSError, RuntimeError):  # gone since the folder was read, not readable, or a circle of links
            if path.resolve(strict=True).is_relative_to(folder) and path.is_file():
                status = path.stat()
                modified = datetime.fromtimestamp(int(status.st_mtime), UTC)
                found.append(CheckpointFile(path=path.name, bytes=status.st_size, modified=modified))
    return found


def admin_router(service: Service) -> APIRouter:
    """The hot swap. ``server.middleware`` rejects everyone but administrators under ``/admin``."""
    router = APIRouter(prefix="/admin")
    schema = SwapBody.model_json_schema()
    body_schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    first_folder: Path | None = None

    def folder() -> Path:
        nonlocal first_folder
        if first_folder is None:  # of the first checkpoint, whatever has been swapped in since
            first_folder = (service.settings.checkpoint_dir or service.model.path.parent).resolve()
        return first_folder

    def unusable(message: str) -> ApiError:
        """The 422 of a file, without the place of the folder, which is internal."""
        message = message.replace(f"{folder()}/", "").replace(str(folder()), "the checkpoint folder")
        return ApiError(422, "checkpoint_unusable", " ".join(message.split()), field="path")

    @router.get("/checkpoint", responses=documented(503))
    async def get_checkpoint() -> CheckpointsResponse:
        """The checkpoint that is served, and the files that could be."""
        return CheckpointsResponse(served=service.model.name, files=await asyncio.to_thread(_checkpoints, folder()))

    @router.post("/checkpoint", responses=documented(409, 413, 422, 503), openapi_extra=body_schema)
    async def swap_checkpoint(http: HttpRequest) -> InfoResponse:
        """Load another checkpoint and serve it. No request is lost: those in flight end on the one they began with."""
        name = read_params(SwapBody, await http.body()).path
        logger.info("swapping to checkpoint %s", name, extra={"client": client_of(http.scope)})
        if service.pool.swapping.locked():
            raise ApiError(409, "swap_in_progress", "another checkpoint is being loaded; try again when it is done")
        if name not in {file.path for file in await asyncio.to_thread(_checkpoints, folder())}:
            raise invalid("path", "path must be one of the files that GET /admin/checkpoint lists")
        try:
            await service.pool.swap(folder() / name)
        except LoadFailed as error:
            raise unusable(str(error)) from error
        except RunFailed as error:
            raise unusable(f"{name}: it loads but does not run; see the server's log") from error
        return describe(service)

    return router
