"""A server around the fake sampler for all tests that only talk to its routes."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving_harness import live_server

from server.fake import FakeSampler


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    with live_server(FakeSampler()) as (client, _):
        yield client
