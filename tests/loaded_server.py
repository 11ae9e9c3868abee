"""A server of noise on a real socket, for the load tests to load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serving_harness import Engine, live_server

from server.fake import FakeSampler


@contextmanager
def fake_server(sampler: FakeSampler, **options: object) -> Iterator[tuple[str, Engine]]:
    """Its address and its engine, ready."""
    with live_server(sampler, **{"max_batch_rows": 8, "max_queue_images": 256, **options}) as (client, engine):
        yield str(client.base_url).rstrip("/"), engine
