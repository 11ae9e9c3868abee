"""The ASGI application: every route around one pool of workers; what a client asks before and beside generating."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.routing import Route

import robuq_core
from robuq_core.config import PredictionType, SamplerConfig, SamplerName, samplers_of
from robuq_core.images import IMAGE_FORMATS, ImageFormat
from robuq_core.params import MAX_IMAGES
from server import middleware
from server.admin import admin_router
from server.compat.kserve import kserve_router
from server.compat.openai import openai_router
from server.errors import install_error_handlers
from server.generate import generate_router
from server.keys import KeyStore
from server.pool import Load, Pool
from server.request import MAX_PRIORITY
from server.service import Service, classes_of, documented
from server.settings import Settings
from server.telemetry import Telemetry

WEB_DIR = Path(__file__).parent / "web"
MAX_QUERY = 200


class StatusResponse(BaseModel):
    """State of the server: starting, ready, restarting, draining, keys_unreadable, failed or stopped."""

    status: str


class ClassItem(BaseModel):
    """One class; the name is empty where the checkpoint has none for it."""

    id: int
    name: str


class ClassesResponse(BaseModel):
    classes: list[ClassItem]


class DecoderSchema(BaseModel):
    """What turns the network's output into pixels; ``pixels`` where it generates them itself."""

    name: str
    weight_bytes: int


class LimitsSchema(BaseModel):
    """Bounds that requests meet. Times in seconds."""

    max_images_per_request: int
    max_batch_rows: int
    max_queue_images: int
    request_timeout_s: float
    max_body_bytes: int


class PrioritiesSchema(BaseModel):
    """Range of ``priority``; one level weighs as much as ``ageing_s`` seconds of waiting."""

    min: int = 0
    max: int = MAX_PRIORITY
    default: int = 0
    ageing_s: float


class InfoResponse(BaseModel):
    """The server, its model, its defaults and its limits."""

    version: str
    checkpoint: str
    backend: str
    average_activation_bits: float
    weight_bytes: int = Field(description="Of the network, without the decoder.")
    decoder: DecoderSchema
    image_size: int
    num_classes: int
    prediction_type: PredictionType
    guidance: bool = Field(description="Whether guidance_scale may be other than 1.")
    replicas: int
    features: list[str]
    samplers: list[SamplerName]
    formats: list[ImageFormat] = list(IMAGE_FORMATS)
    defaults: SamplerConfig
    priorities: PrioritiesSchema
    limits: LimitsSchema


def describe(service: Service) -> InfoResponse:
    """The server and the model that it serves now.

    Raises:
        NotReady: no model has been loaded yet.
    """
    model, settings = service.model, service.settings
    features = ["streaming", "previews", "priorities", "deadlines", "openai", "kserve_v2", "idempotency"]
    if settings.cache_bytes:
        features.append("cache")
    if settings.api_keys_file is not None:
        features.append("api_keys")
    if settings.otel_endpoint is not None:
        features.append("opentelemetry")
    return InfoResponse(
        version=robuq_core.__version__,
        checkpoint=model.name,
        backend=model.backend_name,
        average_activation_bits=model.average_activation_bits,
        weight_bytes=model.weight_bytes,
        decoder=DecoderSchema(name=model.decoder_name, weight_bytes=model.decoder_weight_bytes),
        image_size=model.image_size,
        num_classes=model.num_classes,
        prediction_type=model.prediction_type,
        guidance=model.can_guide,
        replicas=settings.replicas,
        features=features,
        samplers=list(samplers_of(model.prediction_type)),
        defaults=model.defaults,
        priorities=PrioritiesSchema(ageing_s=settings.priority_ageing_s),
        limits=LimitsSchema(
            max_images_per_request=MAX_IMAGES,
            max_batch_rows=settings.max_batch_rows,
            max_queue_images=settings.max_queue_images,
            request_timeout_s=settings.request_timeout_s,
            max_body_bytes=settings.max_body_bytes,
        ),
    )


def discovery_router(service: Service) -> APIRouter:
    """What is served, which classes there are, how long the queue is."""
    router = APIRouter(responses=documented())

    @router.get("/info", responses=documented(503))
    async def get_info() -> InfoResponse:
        """The server, its model, its defaults and its limits."""
        return describe(service)

    @router.get("/classes", responses=documented(422, 503))
    async def get_classes(
        query: Annotated[str, Query(max_length=MAX_QUERY, description="A part of a name, or an id.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="Most classes to return.")] = 20,
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
    """What operators' machines ask: is it alive, does it take requests, how is it doing."""
    router = APIRouter()
    pool = service.pool

    @router.get("/health", responses={503: {"model": StatusResponse, "description": "restart the process"}})
    async def health(response: Response) -> StatusResponse:
        """Liveness: 200 as long as the process can still serve, whatever a worker does; 503 asks for a restart."""
        status = pool.status
        if status in ("failed", "stopped"):
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/ready", responses={503: {"model": StatusResponse, "description": "send no requests here"}})
    async def ready(response: Response) -> StatusResponse:
        """Readiness: 200 while a worker takes images; 503 while starting, restarting or draining, or without readable
        API keys."""
        status = service.status
        if status != "ready":
            response.status_code = 503
        return StatusResponse(status=status)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(pool.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


class _Pages(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        # There is no build step that could put a version into file names, so browsers ask and mostly get 304.
        response.headers["Cache-Control"] = "no-cache"
        return response


def web_router() -> APIRouter:
    """Pages for people: the playground at ``/``, the API's reference at ``/docs``. They need no API key."""
    router = APIRouter()
    pages = _Pages(directory=WEB_DIR)

    @router.get("/", include_in_schema=False)
    async def playground(request: HttpRequest) -> Response:
        return await pages.get_response("index.html", request.scope)

    @router.get("/docs", include_in_schema=False)
    async def reference(request: HttpRequest) -> Response:
        return await pages.get_response("reference.html", request.scope)

    @router.get("/web/{name}", include_in_schema=False)
    async def file(name: str, request: HttpRequest) -> Response:
        return await pages.get_response(name, request.scope)

    return router


def create_app(pool: Pool, settings: Settings) -> FastAPI:
    """The application; its lifespan starts the pool and stops it."""
    telemetry = None if settings.otel_endpoint is None else Telemetry(settings.otel_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        yield
        await pool.stop()
        if telemetry is not None:
            await asyncio.to_thread(telemetry.shutdown)

    app = FastAPI(
        title="RobuQ",
        version=robuq_core.__version__,
        description="Images from a diffusion transformer with ternary weights and about 2-bit activations.",
        lifespan=lifespan,
        # They load scripts from elsewhere; server/web has a page that does not.
        docs_url=None,
        redoc_url=None,
        # They would send clients to whatever host the request names.
        redirect_slashes=False,
    )
    store = None if settings.api_keys_file is None else KeyStore(settings.api_keys_file)
    service = Service(pool, settings, telemetry, store)
    pool.metrics.watch_ready(lambda: service.status == "ready")
    pool.metrics.watch_keys(lambda: 0.0 if store is None else store.unreadable_s)
    images, openai = generate_router(service), openai_router(service)
    app.include_router(images, tags=["images"])
    app.include_router(openai, tags=["OpenAI"])
    app.include_router(kserve_router(service), tags=["KServe"])
    app.include_router(discovery_router(service), tags=["discovery"])
    app.include_router(operations_router(service), tags=["operations"])
    app.include_router(admin_router(service, InfoResponse, lambda: describe(service)), tags=["administration"])
    app.include_router(web_router())
    _shorten(app, images, openai)
    _install_document(app, service)
    install_error_handlers(app)
    middleware.install(app, settings, pool.metrics, store, telemetry)
    if telemetry is not None:
        telemetry.instrument(app)
    return app


def _shorten(app: FastAPI, *routers: APIRouter) -> None:
    """Let the POST routes of ``routers``, whose only argument is the request, be found first and called directly.

    FastAPI's dependency injection costs as much as all else that happens between the socket and the pool.
    """
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and route.methods == {"POST"}:
                direct = Route(route.path, route.endpoint, methods=["POST"], include_in_schema=False)
                app.router.routes.insert(0, direct)


_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


def _header(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": text, "schema": {"type": "string", **schema}}


_REQUEST_HEADERS = [
    # No patterns: one that is malformed is ignored, as W3C asks for traceparent, and the request is answered.
    _header(
        "X-Request-Id",
        "Echoed and logged, if it has at most 128 letters, digits or ._:/+=-; otherwise the server makes an id.",
    ),
    _header("traceparent", "The caller's place in a W3C trace; the answer has traceresponse."),
    _header("Idempotency-Key", "A request without a seed takes its seed from this key.", pattern="^[!-~]+$"),
]


def _install_document(app: FastAPI, service: Service) -> None:
    """Let ``GET /openapi.json`` describe the bodies as the present model takes them, also after a hot swap."""
    original = app.openapi
    made_of: Any = None
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        nonlocal made_of, document
        model = service.model
        if made_of is not model:
            document = copy.deepcopy(original())
            for path, schema_of in service.body_schemas.items():
                schema = copy.deepcopy(schema_of(model))
                document["components"]["schemas"].update(schema.pop("$defs", {}))
                route = document["paths"][path]["post"]
                route["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
                route["parameters"] = [*route.get("parameters", ()), *_REQUEST_HEADERS]
            if service.settings.api_keys_file is not None:
                document["components"]["securitySchemes"] = _KEYS
                document["security"] = [{name: []} for name in _KEYS]
            made_of = model
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to replace it
