"""The server's Prometheus series among those of Ray, with the labels ``deployment`` and ``replica``.

``/metrics`` behind Ray's proxies is that of whichever replica gets the request; Ray's own exporter on each node tells
those of all.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from ray.serve.metrics import Gauge

# Ray sends what it has every ten seconds unless told otherwise.
PUBLISH_S = 5.0


class RayMetrics:
    """Copies every sample of ``registry``: ``ray_robuq_requests_waiting`` for ``robuq_requests_waiting``.

    Counters and buckets become gauges for Ray, since only those can be set; Prometheus' functions do not mind.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}
        self._told: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def publish(self) -> None:
        """Tell Ray the present values; a series that is no more becomes 0."""
        told = set()
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
                told.add((sample.name, tuple(sample.labels.items())))
        for name, labels in self._told - told:
            self._gauges[name].set(0, tags=dict(labels))
        self._told = told
