"""How many replicas a Ray Serve application wants. Ray runs a copy of this: it may import nothing of ours."""

from __future__ import annotations

from typing import Any

IMAGES, REQUESTS = "images_in_flight", "requests_in_flight"


def scale_on_images(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas for the images that are being drawn or wait, in engines and at the proxies.

    Requests alone, which Ray counts by itself, would not do: one of them asks for 1 to 16 images. Those that wait at a
    proxy are taken to be as large as those in the engines. Ray applies the bounds and delays of the deployment.

    Args:
        context: a ``ray.serve.config.AutoscalingContext``; its ``target_ongoing_requests`` counts images here.
    """
    told = context.aggregated_metrics or {}
    images = sum(told.get(IMAGES, {}).values())
    requests = sum(told.get(REQUESTS, {}).values())
    images_per_request = max(1.0, images / requests) if requests else 1.0
    waiting = (context.total_queued_requests or 0.0) * images_per_request
    return (images + waiting) / context.config.target_ongoing_requests, {}
