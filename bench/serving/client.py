"""A lean HTTP/1.1 client, so that what is measured is the server. One connection a user, kept alive."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvloop

T = TypeVar("T")
Body = dict[str, Any]
JSON, PNG = "application/json", "image/png"


@dataclass(frozen=True)
class Answer:
    """``header`` has lower-case names; ``seconds`` from the first byte sent to the last received."""

    status: int
    header: dict[str, str]
    content: bytes
    seconds: float


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    def send(self, body: Body, accept: str = JSON) -> None:
        content = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nAccept: {accept}\r\n"
        self.writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    async def ask(self, body: Body, accept: str = JSON) -> Answer:
        began = time.perf_counter()
        self.send(body, accept)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        header = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = await self.reader.readexactly(int(header["content-length"]))
        return Answer(int(first.split()[1]), header, content, time.perf_counter() - began)


@dataclass
class Load:
    """What a closed loop did. ``seconds`` until its last answer."""

    answers: list[Answer] = field(default_factory=list)
    cut_off: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def all_served(self) -> bool:
        return all(answer.status == 200 for answer in self.answers)


async def closed_loop(
    url: str,
    body: Callable[[], Body],
    *,
    users: int,
    seconds: float = float("inf"),
    requests: float = float("inf"),
    accept: str = JSON,
    cut_off: float = 0.0,
) -> Load:
    """``users`` ask again as soon as they are answered, for so many seconds or requests.

    The share ``cut_off`` of requests is left within 0.1 s: the connection is closed, a new one opened.
    """
    load, sent, rng = Load(), 0, random.Random(0)
    began = time.perf_counter()

    async def user() -> None:
        nonlocal sent
        connection = await Connection.open(url)
        while sent < requests and time.perf_counter() - began < seconds:
            sent += 1
            if rng.random() < cut_off:
                connection.send(body(), accept)
                await asyncio.sleep(rng.random() * 0.1)
                connection.writer.close()
                connection = await Connection.open(url)
                load.cut_off += 1
            else:
                load.answers.append(await connection.ask(body(), accept))
        connection.writer.close()

    await asyncio.gather(*(user() for _ in range(users)))
    load.seconds = time.perf_counter() - began
    return load


def run(work: Coroutine[Any, Any, T]) -> T:
    """On uvloop, so that the client is the lesser part."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
