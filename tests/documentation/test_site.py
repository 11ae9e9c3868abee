"""The documentation site builds with strict links, loads nothing from other hosts, and fits a narrow screen."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from serving_harness import live_server

import robuq_core
from server.fake import FakeSampler

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\s(?:src|href)=\"?([^\"\s>]+)|url\([\"']?([^\"')]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a link or an anchor that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def text_of(site: Path, name: str) -> str:
    """Of a page, without its tags, one space between words."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", (site / f"{name}.html").read_text())).split())


def ids_of(site: Path, name: str) -> list[str]:
    return re.findall(r"\sid=\"?([^\"\s>]+)", (site / f"{name}.html").read_text())


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for target in map("".join, LOADED.findall(path.read_text())):
            assert not re.match(r"(https?:)?//", target), f"{path.relative_to(site)} loads {target}"


def test_equations_are_set(site: Path) -> None:
    equations = re.findall(r"^```math\n(.*?)^```", (ROOT / "docs" / "method.md").read_text(), re.M | re.S)
    assert (site / "method.html").read_text().count("<math ") == len(equations) > 0
    ids = ids_of(site, "method")
    assert len(ids) == len(set(ids)), "an identifier twice in a page"


def test_the_http_reference_is_that_of_a_server(site: Path) -> None:
    with live_server(FakeSampler()) as (client, _):
        assert json.loads((site / "api" / "openapi.json").read_text()) == client.get("/openapi.json").json()
    assert "api/index.html" in (site / "http-api.html").read_text()


def test_what_is_public_is_in_the_references(site: Path) -> None:
    ids = ids_of(site, "python-api")
    for name in set(robuq_core.__all__) - {"__version__"}:
        assert any(i.startswith("robuq_core.") and i.endswith(f".{name}") for i in ids), name
    assert {"robuq_core.pipeline.Sampler.generate", "train.config.TrainConfig"} <= set(ids)
    assert "--max-batch-rows" in text_of(site, "serving")
    assert "average_bits: null" in text_of(site, "training")


def test_files_of_the_repository_are_in_the_site(site: Path) -> None:
    targets = {t for path in PAGES for t in re.findall(r"\]\(\.\./([^)#\s]+)", path.read_text())}
    for target in targets - {"CHANGELOG.md", "THIRD_PARTY.md"}:
        assert (site / "source" / target).read_bytes() == (ROOT / target).read_bytes()
    assert f"[{robuq_core.__version__}]" in text_of(site, "changelog")
    assert "ImageNet" in text_of(site, "licences")


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
    """No request to another host, no script error, no page that scrolls sideways; the search finds a word."""
    requests: list[str] = []
    faults: list[str] = []
    tab = chromium.new_page(viewport={"width": width, "height": 900})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    for path in sorted(site.glob("*.html")):
        tab.goto(f"{address}/{path.name}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, path.name
    tab.goto(f"{address}/api/index.html")
    tab.wait_for_selector('summary:has-text("POST /generate")')
    tab.goto(f"{address}/index.html?q=drain")
    tab.wait_for_selector(".md-search-result__item")
    tab.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    assert not faults
