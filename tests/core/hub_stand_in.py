"""A hub on 127.0.0.1, as far as a download asks it: what a revision is, which files a commit has, and for the files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

TOKEN = "hf_of_someone"
# What it is asked: /api/models/OWNER/NAME/revision/X, /api/models/OWNER/NAME/tree/X, /OWNER/NAME/resolve/X/FILE.
_ASKED = re.compile(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?")


class Hub(BaseHTTPRequestHandler):
    """Serves ``commits``, folders by their names, in each of ``repos``; ``branches`` names commits.

    One that is called ``private`` wants a token, and one that is called ``gated`` gives no files. ``asked`` has the
    method and path of all requests.
    """

    repos: ClassVar[tuple[str, ...]] = ("someone/tiny", "someone/private", "someone/gated")
    commits: ClassVar[dict[str, Path]]
    branches: ClassVar[dict[str, str]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(f"{self.command} {path}")
        match = _ASKED.fullmatch(path)
        if match is None:
            return self._refuse(404, "EntryNotFound")
        repo, kind, revision, file = match.groups()
        if repo.endswith("/private") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401)
        if repo not in self.repos:
            return self._refuse(404, "RepoNotFound")
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            return self._refuse(404, "RevisionNotFound")
        if kind == "resolve":
            return self._give(repo, commit, file)
        files = sorted(self.commits[commit].iterdir())
        if kind == "tree":
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)} for f in files]
            return self._send(200, json.dumps(entries).encode())
        about = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": f.name} for f in files]}
        return self._send(200, json.dumps(about).encode())

    do_HEAD = do_GET

    def _give(self, repo: str, commit: str, file: str) -> None:
        path = self.commits[commit] / file
        if repo.endswith("/gated"):
            self._refuse(401, "GatedRepo")
        elif path.is_file():
            self._send(200, path.read_bytes(), **{"X-Repo-Commit": commit, "ETag": f'"{_digest(path)}"'})
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str | None = None) -> None:
        self._send(status, b"{}", **({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def hub(commits: dict[str, Path], branches: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Its address, for ``HF_ENDPOINT``, and the list of what it is asked."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"commits": commits, "branches": branches, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
