"""Pages of the playground in the browser of tests/conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_harness import TIMEOUT_MS, OpenPage, Playground
from playwright.sync_api import Browser


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server in a browser of its own; at the end no page may have had a fault."""
    pages: list[Playground] = []
    contexts = []

    def open_one(base_url: object, *, width: int = 1280, scheme: str = "light", motion: str = "reduce") -> Playground:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            reduced_motion=motion,  # type: ignore[arg-type]
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        pages.append(Playground(context, str(base_url)))
        return pages[-1]

    yield open_one
    for page in pages:
        page.check()
    for context in contexts:
        context.close()
