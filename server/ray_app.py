"""The server on a Ray cluster: replicas on many machines behind one address, as many as there is work for.

    serve run server.ray_app:app checkpoint=/models/mine.safetensors max_replicas=8 cpus=4

Every replica has a pool of workers with a queue of its own and answers the same routes as ``robuq-serve``; Ray Serve
routes, scales, drains and replaces them. Needs the extra ``robuq[ray]``.
"""

# Annotations are left as they are: Ray looks at that of `app` to validate its arguments.

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.keys import read_keys
from server.lifecycle import DELIVERY_TIMEOUT_S
from server.logs import configure_logging
from server.metrics import Metrics
from server.pool import Pool
from server.ray_support import IMAGES, PUBLISH_S, REQUESTS, RayMetrics, TwoChoices, scale_on_images
from server.settings import TARGET_UTILISATION, Settings

_READY_POLL_S = 0.05


class ClusterSettings(Settings):
    """Settings of every replica, and of their number. ``host``, ``port`` and connections are Ray's business."""

    model_config = SettingsConfigDict(extra="forbid")

    min_replicas: int = Field(1, ge=1, description="Minimum number of replicas.")
    max_replicas: int = Field(4, ge=1, description="Maximum number of replicas.")
    cpus: float = Field(1.0, gt=0, description="CPUs that a replica reserves, and its threads unless those are given.")
    gpus: float = Field(0.0, ge=0, description="GPUs that a replica reserves.")
    images_per_replica: float | None = Field(
        None,
        gt=0,
        description="Images in flight for which there should be a replica; 70% of a guided batch by default.",
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="Seconds of too much work until replicas are added.")
    downscale_delay_s: float = Field(
        300.0, ge=0, description="Seconds of too little work until replicas are taken away."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ClusterSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} must be at least min_replicas {self.min_replicas}")
        return self

    @property
    def target_images(self) -> float:
        """Images in flight per replica that the autoscaler aims for; a guided image takes two rows of a batch."""
        return self.images_per_replica or TARGET_UTILISATION * self.max_batch_rows / 2

    def of_a_replica(self) -> dict[str, Any]:
        """The settings of :class:`Settings` as plain data, each given, so that no node's own variables come in."""
        given = self.model_dump(mode="json", include=set(Settings.model_fields))
        # Ray knows what it has reserved; torch would take every core of the node. Its proxies, not a loopback address,
        # are what clients call.
        return {**given, "threads": self.threads or max(1, int(self.cpus)), "host": "0.0.0.0"}


@serve.deployment(name="robuq")
@serve.ingress()
class Replica:
    """A pool of workers and the routes around it. Ray sends it requests once its workers are warm.

    Raises:
        UserError: the file of keys cannot be used; Ray reports the deployment as failed.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.settings = settings = Settings(**given)
        configure_logging(settings.log_level)
        if settings.api_keys_file is not None:
            read_keys(settings.api_keys_file)
        self.pool = Pool(settings, Metrics(settings.max_batch_rows))

    def __serve_build_asgi_app__(self) -> FastAPI:
        app: FastAPI = create_app(self.pool, self.settings)
        app.add_middleware(_ProxyNamesRequest)
        _begin_warm(app, self.pool)
        return app

    def check_health(self) -> None:
        """Ray replaces a replica that raises here three times in a row.

        Raises:
            RuntimeError: the pool takes no requests; there is no readiness beside liveness in Ray.
        """
        if self.pool.status != "ready":
            raise RuntimeError(f"the server is {self.pool.status}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :func:`server.ray_support.scale_on_images` goes by."""
        load = self.pool.load()
        return {IMAGES: load.images_in_flight, REQUESTS: load.requests_running + load.requests_waiting}


class _ProxyNamesRequest:
    """Ray's proxies give requests ids and put them into answers; this keeps ours from saying the same once more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                # It differs where the client's was not fit for a log; then the answer must have it.
                if headers.get("x-request-id") == Headers(scope=scope).get("x-request-id"):
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_id if scope["type"] == "http" else send)


def _begin_warm(app: FastAPI, pool: Pool) -> None:
    """Let the start-up of ``app`` last until its pool is ready, and publish its series to Ray from then on."""
    start = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with start(app):
            while pool.status == "starting":
                await asyncio.sleep(_READY_POLL_S)
            if pool.status != "ready":
                raise RuntimeError(f"the server is {pool.status}") from pool.failure
            publishing = asyncio.create_task(_publish(pool))
            try:
                yield
            finally:
                publishing.cancel()

    app.router.lifespan_context = lifespan


async def _publish(pool: Pool) -> None:
    metrics = RayMetrics(pool.metrics.registry)
    while True:
        metrics.publish()
        await asyncio.sleep(PUBLISH_S)


def app(settings: ClusterSettings) -> serve.Application:
    """The application for ``serve run`` and ``serve deploy``; arguments that are not given come from ``ROBUQ_*``."""
    scaling = AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.target_images,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=scale_on_images),
    )
    deployment = cast(serve.Deployment, Replica).options(
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # Enough to have the next batch at hand. What is beyond waits at the proxies, where a new replica finds it.
        max_ongoing_requests=2 * settings.max_batch_rows,
        max_queued_requests=settings.max_queue_images,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=scaling,
        request_router_config=RequestRouterConfig(request_router_class=TwoChoices),
        graceful_shutdown_timeout_s=settings.drain_timeout_s + DELIVERY_TIMEOUT_S,
        health_check_period_s=5,
        health_check_timeout_s=10,
    )
    return deployment.bind(settings.of_a_replica())
