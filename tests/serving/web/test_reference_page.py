"""/docs in a real browser: every route of the OpenAPI document, at any width, with keys and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser_harness import WIDTHS, OpenPage
from playwright.sync_api import expect
from serving_harness import live_server

from server.fake import FakeSampler
from server.keys import create_key

pytestmark = pytest.mark.browser


def test_every_route_is_described(open_page: OpenPage) -> None:
    with live_server(FakeSampler()) as (client, _):
        document = client.get("/openapi.json").json()
        page = open_page(client.base_url)
        page.find("nav a", has_text="API").click()
        routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
        expect(page.find("summary")).to_have_count(len(routes))
        shown = [summary.inner_text() for summary in page.find("summary").all()]
        assert all(any(text.startswith(route) for text in shown) for route in routes)
        generate = page.find("details", has_text="POST /generate").first
        generate.locator("summary").press("Enter")
        body = generate.get_by_role("table", name="Body")
        fields = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"][
            "properties"
        ]
        expect(body.get_by_role("row")).to_have_count(len(fields))
        expect(body.get_by_role("row", name="class_id")).to_contain_text("integer, 0 to 4")
        expect(body.get_by_role("row", name="sampler")).to_contain_text("ddpm, ddim, dpmsolver++")
        page.page.evaluate("document.querySelectorAll('details').forEach((node) => (node.open = true))")
        for width in WIDTHS:
            page.page.set_viewport_size({"width": width, "height": 900})
            assert page.page.evaluate("document.documentElement.scrollWidth") == width
        answers = generate.get_by_role("table", name="Answers", exact=True)
        expect(answers.get_by_role("row", name="429")).to_contain_text("queue_full")


def test_the_reference_of_a_server_with_keys(open_page: OpenPage, tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.json", "somebody")
    with live_server(FakeSampler(), api_keys_file=tmp_path / "keys.json") as (client, _):
        page = open_page(client.base_url)
        page.expect_status(401)
        page.page.goto(f"{client.base_url}/docs")
        expect(page.find("#reference")).to_contain_text("Enter it in the playground, then come back")
        page.find("nav a", has_text="Playground").click()
        page.find("#key").fill(key)
        page.find("#key").press("Enter")
        page.described()
        page.find("nav a", has_text="API").click()
        expect(page.find("summary").first).to_be_visible()
