"""``/admin/checkpoint``: what is served, what else could be, and the switch from one to the other under load."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robuq_core.errors import UserError
from server.api.auth import current_client
from server.api.discovery import describe
from server.api.errors import ApiError, from_validation, invalid
from server.api.responses import documented
from server.api.schemas import InfoResponse
from server.engine import Engine, EngineError
from server.engine.model import StepSampler
from server.settings import Settings

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"

Answer = TypeVar("Answer")


class SwapRequest(BaseModel):
    """Which file to serve from now on."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"path": "v2.safetensors"}]})

    path: Annotated[str, Field(min_length=1, max_length=255, description="A file that GET /admin/checkpoint lists.")]


class CheckpointFile(BaseModel):
    """A file that could be served; whether it can shows when it is loaded."""

    path: str
    bytes: int
    modified: datetime


class CheckpointsResponse(BaseModel):
    """``served`` is the name of the checkpoint as in /info."""

    served: str
    files: list[CheckpointFile]


class CheckpointFolder:
    """The one folder that a swap may load from; what leads out of it, a link too, is not in it."""

    def __init__(self, settings: Settings) -> None:
        from robuq_core.pipeline import bundled_checkpoint

        chosen = settings.checkpoint_dir or (settings.checkpoint or bundled_checkpoint()).parent
        self._folder = chosen.resolve()

    def files(self) -> list[CheckpointFile]:
        """Its checkpoints by name."""
        found = []
        for path in sorted(self._folder.glob("*" + SUFFIX)):
            if self._inside(path):
                with suppress(FileNotFoundError):  # gone since the folder was read
                    status = path.stat()
                    modified = datetime.fromtimestamp(int(status.st_mtime), UTC)
                    found.append(CheckpointFile(path=path.name, bytes=status.st_size, modified=modified))
        return found

    def find(self, name: str) -> Path:
        """The file called ``name``.

        Raises:
            ApiError: 422, no such file.
        """
        path = self._folder / name
        # Only a bare name stays itself: neither a/b nor .. nor an absolute path does. NUL is no part of any name.
        if Path(name).name != name or "\0" in name or not name.endswith(SUFFIX) or not self._inside(path):
            raise invalid("path", "path must be one of the files that GET /admin/checkpoint lists")
        return path

    def public(self, message: str) -> str:
        """``message`` without the place of the folder, which is nobody's business outside."""
        return message.replace(f"{self._folder}/", "").replace(str(self._folder), "the checkpoint folder")

    def _inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self._folder) and path.is_file()
        except (OSError, RuntimeError):  # missing, not ours to read, or a circle of links
            return False


def _in_thread(function: Callable[[], Answer]) -> asyncio.Future[Answer]:
    """Run ``function`` in a thread that does not keep the process from ending, as those of an executor would."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="admin", daemon=True).start()
    return asyncio.wrap_future(future)


def _unusable(message: str) -> ApiError:
    return ApiError(422, "checkpoint_unusable", " ".join(message.split()), field="path")


class CheckpointSwitch:
    """Loads, warms up and switches; one at a time."""

    def __init__(self, engine: Engine, settings: Settings, folder: CheckpointFolder) -> None:
        self._engine = engine
        self._settings = settings
        self._folder = folder
        self._busy = threading.Lock()

    def __call__(self, name: str) -> None:
        """Serve the file called ``name``. Returns when new requests go to it; what fails changes nothing.

        Raises:
            ApiError: 409, 422. NotReady: the engine is not serving.
        """
        if not self._busy.acquire(blocking=False):
            raise ApiError(409, "swap_in_progress", "another checkpoint is being loaded; try again when it is done")
        try:
            self._engine.swap(self._load(self._folder.find(name)))
        except (ApiError, EngineError):
            raise
        except UserError as error:  # of the warm-up
            raise _unusable(f"{name}: {error}") from error
        except BaseException as error:  # a SystemExit would end the server that is to go on as before
            logger.exception("checkpoint %s does not run", name)
            raise _unusable(f"{name}: it loads but does not run; the server's log has why") from error
        finally:
            self._busy.release()

    def _load(self, path: Path) -> Sequence[StepSampler]:
        from server.loading import load_samplers  # here, so that the routes need no torch

        try:
            return load_samplers(path, self._settings)
        except (UserError, ValueError, OSError) as error:
            raise _unusable(self._folder.public(str(error))) from error


def admin_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes, bound to an engine. ``Authentication`` keeps everybody but administrators out of ``/admin``."""
    router = APIRouter(prefix="/admin")
    folder = CheckpointFolder(settings)
    switch = CheckpointSwitch(engine, settings, folder)
    schema = SwapRequest.model_json_schema()
    body_schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @router.get("/checkpoint", responses=documented())
    async def get_checkpoint() -> CheckpointsResponse:
        """The checkpoint that is served, and the files that could be."""
        return CheckpointsResponse(served=engine.sampler.checkpoint_name, files=await _in_thread(folder.files))

    @router.post("/checkpoint", responses=documented(409, 413, 422, 503), openapi_extra=body_schema)
    async def swap_checkpoint(request: Request) -> InfoResponse:
        """Load another checkpoint and serve it. No request is lost: those in flight end on the one that they met."""
        try:
            name = SwapRequest.model_validate_json(await request.body()).path
        except ValidationError as error:
            raise from_validation(error, schema) from None
        logger.info("checkpoint %s was asked for", name, extra={"client": current_client(request)})
        await _in_thread(lambda: switch(name))
        return describe(engine, settings)

    return router
