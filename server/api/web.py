"""Pages for people, from ``server/web``: the playground at ``/`` and the API's reference at ``/docs``.

Static files, read once and revalidated by ETag. They hold nothing of the model and need no API key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.errors import ApiError

WEB_DIR = Path(__file__).parents[1] / "web"

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# There is no build step that could put a version into file names, so browsers ask each time and mostly get 304.
_HEADERS = {"Cache-Control": "no-cache"}


class _Asset:
    """One file and the headers that it is sent with."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.etag = f'"{hashlib.sha256(self.content).hexdigest()[:20]}"'
        self.headers = {**_HEADERS, "ETag": self.etag, "Content-Type": _MEDIA_TYPES[path.suffix]}

    def answer(self, request: Request) -> Response:
        """The file, or 304 if the client has it (RFC 9110, section 13.1.2: weak comparison, a list or ``*``)."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or known == ["*"]:
            return Response(status_code=304, headers={k: v for k, v in self.headers.items() if k != "Content-Type"})
        return Response(self.content, headers=self.headers)


def web_router() -> APIRouter:
    """``GET /``, ``/docs`` and ``/web/{name}``."""
    router = APIRouter()
    assets = {path.name: _Asset(path) for path in WEB_DIR.iterdir() if path.suffix in _MEDIA_TYPES}

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground(request: Request) -> Response:
        return assets["index.html"].answer(request)

    @router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def reference(request: Request) -> Response:
        return assets["reference.html"].answer(request)

    @router.api_route("/web/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        # A table rather than the disk is asked, so no name can lead out of the folder.
        if name not in assets:
            raise ApiError(404, "not_found", f"no such file of these pages: {name[:64]}")
        return assets[name].answer(request)

    return router
