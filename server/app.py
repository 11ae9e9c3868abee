"""The ASGI application: every route around one pool of workers, the pages for people, the OpenAPI document."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.routing import Route

import robuq_core
from server import middleware
from server.errors import install_error_handlers
from server.generate import generate_router
from server.keys import KeyStore
from server.openai_api import openai_router
from server.pool import Pool
from server.routes import admin_router, discovery_router, operations_router
from server.service import Service
from server.settings import Settings
from server.telemetry import Telemetry

WEB_DIR = Path(__file__).parent / "web"


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
    pool.metrics.watch("ready", lambda: service.status == "ready")
    pool.metrics.watch("api_keys_unreadable_seconds", lambda: 0.0 if store is None else store.unreadable_s)
    images, openai = generate_router(service), openai_router(service)
    app.include_router(images, tags=["images"])
    app.include_router(openai, tags=["OpenAI"])
    app.include_router(discovery_router(service), tags=["discovery"])
    app.include_router(operations_router(service), tags=["operations"])
    app.include_router(admin_router(service), tags=["administration"])
    app.include_router(web_router())
    _shorten(app, images, openai)
    _install_document(app, service)
    install_error_handlers(app)
    middleware.install(app, settings, pool.metrics, store)
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
    _header("traceparent", "The caller's place in a W3C trace; its trace id is logged."),
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
