"""Which replica of a Ray Serve application a request goes to."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class TwoChoices(FIFOMixin, RequestRouter):
    """Two replicas at random, wherever they are; Ray sends the request to the one that has fewer.

    Ray's own router draws from the proxy's node alone until the replicas there accept no more. That saves a hop between
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
