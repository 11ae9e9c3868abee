"""The documentation site builds with strict links, asks nobody else for anything, and fits a narrow screen."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from serving_harness import live_server

import robuq_core
from server.fake import FakeSampler

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a link or an anchor that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


class Page(HTMLParser):
    """What a page loads, where it links to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag in ("script", "img", "iframe", "source", "video") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "edit"):
            self.loads.append(given["href"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(site: Path, name: str) -> Page:
    return Page((site / f"{name}.html").read_text())


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES:
        assert re.search(rf": {re.escape(path.name)}$", config, re.M), f"{path.name} is not in the nav of mkdocs.yml"
        assert (site / f"{path.stem}.html").is_file()


@pytest.mark.parametrize("suffix", ["html", "css"])
def test_nothing_comes_from_elsewhere(site: Path, suffix: str) -> None:
    for path in site.rglob(f"*.{suffix}"):
        text = path.read_text()
        for target in (*Page(text).loads, *re.findall(r"(?:@import|url\()\s*[\"']?([^\"')]+)", text)):
            assert not re.match(r"(https?:)?//", target), f"{path.relative_to(site)} loads {target}"


def test_equations_are_set(site: Path) -> None:
    method = page(site, "method")
    equations = re.findall(r"^```math\n(.*?)^```", (ROOT / "docs" / "method.md").read_text(), re.M | re.S)
    assert len(equations) == 6
    assert (site / "method.html").read_text().count("<math ") == len(equations)
    assert len(method.ids) == len(set(method.ids)), "an identifier twice in a page"
    assert "prefers-color-scheme" not in (site / "method.html").read_text().partition('<figure class="drawing">')[2]


def test_every_route_is_in_the_http_reference(site: Path) -> None:
    text = " ".join("".join(page(site, "http-api").text).split())
    with live_server(FakeSampler()) as (client, _):
        document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in text
            assert " ".join(str(operation.get("description", "")).split())[:40].replace("`", "") in text
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "guidance_scale" in body["properties"]
    for field, schema in body["properties"].items():
        assert f"{field} " in text
        assert " ".join(schema["description"].split())[:40].replace("`", "") in text


def test_what_is_public_is_in_the_references(site: Path) -> None:
    ids = page(site, "python-api").ids
    for name in robuq_core.__all__:
        if name != "__version__":
            assert any(i.startswith("robuq_core.") and i.endswith(f".{name}") for i in ids), name
    assert {"robuq_core.pipeline.Sampler.generate", "train.config.TrainConfig"} <= set(ids)
    assert "--max-batch-rows" in "".join(page(site, "serving").text)
    assert "average_bits: null" in "".join(page(site, "training").text)


def test_files_of_the_repository_that_pages_link_to_are_there(site: Path) -> None:
    targets = {t for path in PAGES for t in re.findall(r"\]\(\.\./([^)#\s]+)", path.read_text())}
    for target in targets - {"CHANGELOG.md", "THIRD_PARTY.md"}:
        assert (site / "source" / target).read_bytes() == (ROOT / target).read_bytes()
    assert f"[{robuq_core.__version__}]" in "".join(page(site, "changelog").text)
    assert "ImageNet" in "".join(page(site, "licences").text)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1440])
def test_pages_in_a_browser(site: Path, address: str, chromium: Browser, width: int) -> None:
    """No request to anybody else, no error of a script, no page that scrolls sideways."""
    requests: list[str] = []
    faults: list[str] = []
    tab = chromium.new_page(viewport={"width": width, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    for path in sorted(site.glob("*.html")):
        tab.goto(f"{address}/{path.name}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, path.name
    tab.goto(f"{address}/index.html?q=drain")
    tab.wait_for_selector(".md-search-result__item")
    tab.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert not faults
