"""The ASGI application: routes, error shape and middleware around one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import robuq_core
from server.api.admin import admin_router
from server.api.auth import Authentication
from server.api.catalog import Catalog
from server.api.discovery import discovery_router
from server.api.errors import install_error_handlers
from server.api.generate import generate_router
from server.api.intake import Intake
from server.api.kserve import kserve_router
from server.api.middleware import RequestContext
from server.api.openai import openai_router
from server.api.openapi import install_document
from server.api.operations import operations_router
from server.api.security import CORS, RequestLimits
from server.api.shortcut import shorten
from server.api.web import web_router
from server.engine import Engine
from server.keys import KeyStore
from server.settings import Settings
from server.telemetry import Telemetry


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application; its lifespan starts the engine and stops it."""
    telemetry = None if settings.otel_endpoint is None else Telemetry(settings.otel_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        if telemetry is not None:
            await asyncio.to_thread(telemetry.shutdown)

    app = FastAPI(
        title="RobuQ",
        version=robuq_core.__version__,
        description="Images from a diffusion transformer with ternary weights and about 2-bit activations.",
        lifespan=lifespan,
        # They load scripts from elsewhere; server.api.web has a page that does not.
        docs_url=None,
        redoc_url=None,
        # They would send clients to whatever host the request names.
        redirect_slashes=False,
    )
    store = None if settings.api_keys_file is None else KeyStore(settings.api_keys_file)
    intake = Intake(engine, settings, Catalog(settings.request_timeout_s), telemetry, store)
    engine.metrics.watch_ready(lambda: intake.status == "ready")
    engine.metrics.watch_keys(lambda: 0.0 if store is None else store.unreadable_s)
    images, openai = generate_router(intake), openai_router(intake)
    app.include_router(images, tags=["images"])
    app.include_router(openai, tags=["OpenAI"])
    app.include_router(kserve_router(intake), tags=["KServe"])
    app.include_router(discovery_router(intake), tags=["discovery"])
    app.include_router(operations_router(intake), tags=["operations"])
    app.include_router(admin_router(engine, settings), tags=["administration"])
    app.include_router(web_router())
    shorten(app, images, openai)
    install_document(app, intake)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(Authentication, store=store, metrics=engine.metrics)
    app.add_middleware(RequestLimits, settings=settings)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(RequestContext, telemetry=telemetry)
    if telemetry is not None:
        telemetry.instrument(app)
    return app
