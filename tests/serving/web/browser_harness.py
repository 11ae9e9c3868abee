"""The playground in a real browser that is watched: errors in its console, requests to anybody but its server."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Locator, Page, expect

# Long, for machines that share their cores; nothing waits for it when all is well.
TIMEOUT_MS = 20_000
WIDTHS = (360, 768, 1440)

expect.set_options(timeout=TIMEOUT_MS)

OpenPage = Callable[..., "Playground"]


class Playground:
    """The page of one server, and what happened around it."""

    def __init__(self, context: BrowserContext, base_url: str) -> None:
        self.base_url = base_url
        self.faults: list[str] = []
        self.foreign: list[str] = []
        self.expected_faults: list[str] = []  # regular expressions
        self.page: Page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self._request(request.url))
        self.page.goto(base_url)

    def _console(self, message: object) -> None:
        if getattr(message, "type", "") in ("error", "warning"):
            self.faults.append(str(getattr(message, "text", "")))

    def _request(self, url: str) -> None:
        if not url.startswith((self.base_url, "data:", "blob:")):
            self.foreign.append(url)

    def expect_status(self, status: int) -> None:
        """Browsers log each answer of that status as an error of the page; here it is none."""
        self.expected_faults.append(rf"Failed to load resource: .* status of {status} ")

    def check(self) -> None:
        """Fail if the page has had a fault or has asked anybody but its server."""
        faults = [f for f in self.faults if not any(re.match(expected, f) for expected in self.expected_faults)]
        assert not faults
        assert not self.foreign

    def find(self, selector: str, *, has_text: str | None = None) -> Locator:
        return self.page.locator(selector, has_text=has_text)

    def described(self) -> None:
        """Wait until the page knows the server and has chosen a class."""
        expect(self.find("#facts")).to_contain_text("checkpoint")
        expect(self.find("#class")).not_to_have_value("")

    def fill(self, **values: object) -> None:
        """Fields of the form by their ids; a class as its number or name, without the list."""
        for name, value in values.items():
            self.find(f"#{name.rstrip('_')}").fill(str(value))

    def draw(self, **values: object) -> None:
        """Fill fields, press Generate and wait for the result."""
        before = self.find(".strip").count()
        self.fill(**values)
        self.find("#generate").click()
        expect(self.find(".strip")).to_have_count(before + 1)
        expect(self.find(".strip").first).to_have_attribute("data-state", "done")

    def focused(self) -> str:
        """The id of the element that has the focus."""
        return str(self.page.evaluate("document.activeElement.id"))

    def tab_to(self, selector: str) -> None:
        """Press Tab until the focus is on ``selector``."""
        for _ in range(60):
            if self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reaches {selector}")
