"""The files of the pages as a browser gets them: types, revalidation, size, and nothing from anywhere else."""

from __future__ import annotations

import re
from email.message import Message

import httpx
import pytest

from server.app import WEB_DIR

FILES = sorted(path.name for path in WEB_DIR.iterdir())
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Names of XML vocabularies, which nobody fetches.
NAMESPACES = {"http://www.w3.org/2000/svg"}
LIMIT_BYTES = 60_000


def media_type(answer: httpx.Response) -> str:
    message = Message()
    message["Content-Type"] = answer.headers["content-type"]
    return message.get_content_type()


@pytest.mark.parametrize(("path", "name"), [("/", "index.html"), ("/docs", "reference.html")])
def test_the_pages(client: httpx.Client, path: str, name: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, media_type(answer)) == (200, "text/html")
    assert answer.content == (WEB_DIR / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_its_type_and_is_revalidated(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/web/{name}")
    assert (answer.status_code, media_type(answer)) == (200, TYPES["." + name.rpartition(".")[2]])
    assert answer.content == (WEB_DIR / name).read_bytes()
    assert answer.headers["cache-control"] == "no-cache"
    again = client.get(f"/web/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "name", ["", "none.js", "..%2fsettings.py", "%2e%2e/api/web.py", "..%5capp.py", "index.html%00"]
)
def test_there_is_no_way_out_of_the_folder(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/web/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_everything_is_small_and_local() -> None:
    texts = {name: (WEB_DIR / name).read_text() for name in FILES}
    assert sum(len(text.encode()) for text in texts.values()) < LIMIT_BYTES
    for name, text in texts.items():
        foreign = set(re.findall(r"https?://[^\s'\"`<>)]+", text)) - NAMESPACES
        assert not foreign, f"{name} names {foreign}"
        # A policy without 'unsafe-inline' blocks these without a word.
        assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=\"|javascript:", text), name


def test_every_file_that_is_named_exists() -> None:
    pages = {"index.html", "reference.html"}
    named = {name for page in pages for name in re.findall(r'(?:src|href)="web/([^"]+)"', (WEB_DIR / page).read_text())}
    for name in FILES:
        named |= set(re.findall(r'from "\./([^"]+)"', (WEB_DIR / name).read_text()))
    assert named | pages == set(FILES)
