"""What :mod:`server.ray_app` gives to Ray Serve: metrics, the choice of a replica, the number of replicas.

Ray runs copies of this on its controller and proxies: it may import nothing of ours.
"""

from __future__ import annotations

import random
from typing import Any

from prometheus_client import CollectorRegistry
from ray.serve.metrics import Gauge
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

# Ray sends what it has every ten seconds by default.
PUBLISH_S = 5.0


class RayMetrics:
    """Copies every sample of ``registry`` to Ray: ``ray_robuq_requests_waiting`` for ``robuq_requests_waiting``, with
    labels ``deployment`` and ``replica``. ``/metrics`` behind Ray's proxies is that of one replica.

    Counters and buckets become gauges for Ray, since only those can be set; Prometheus' functions do not mind.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}
        self._published: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def publish(self) -> None:
        published = set()
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name not in self._gauges:
                    tags = tuple(sample.labels)
                    self._gauges[sample.name] = Gauge(
                        sample.name,
                        description=family.documentation,
                        tag_keys=tags,
                    )
                self._gauges[sample.name].set(sample.value, tags=dict(sample.labels))
                published.add((sample.name, tuple(sample.labels.items())))
        for name, labels in self._published - published:
            self._gauges[name].set(0, tags=dict(labels))
        self._published = published


class TwoChoices(FIFOMixin, RequestRouter):
    """Two replicas at random, wherever they are; Ray sends the request to the one that has fewer.

    Ray's own router takes replicas of the proxy's node alone until they accept no more. That saves a hop between
    machines, which is nothing beside an image, and lets requests wait on one node while others are idle.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates as the one group that Ray compares."""
        if pending_request is not None:
            # There is no nearer group to try at once: while all are full, Ray is to wait longer and longer.
            pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


IMAGES, REQUESTS = "images_in_flight", "requests_in_flight"


def scale_on_images(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas for the images that are being generated or wait, in pools and at the proxies.

    Requests alone, which Ray counts by itself, would not do: one of them asks for 1 to 16 images. Those that wait at a
    proxy are taken to be as large as those in the pools. Ray applies the bounds and delays of the deployment.

    Args:
        context: a ``ray.serve.config.AutoscalingContext``; its ``target_ongoing_requests`` counts images here.
    """
    found = context.aggregated_metrics or {}
    images = sum(found.get(IMAGES, {}).values())
    requests = sum(found.get(REQUESTS, {}).values())
    images_per_request = max(1.0, images / requests) if requests else 1.0
    waiting = (context.total_queued_requests or 0.0) * images_per_request
    return (images + waiting) / context.config.target_ongoing_requests, {}
