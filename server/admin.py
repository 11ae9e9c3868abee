"""``/admin/checkpoint``: what is served, what else could be, and the switch from one to the other under load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field

from robuq_core.params import NullMeansAbsent, read_params
from server.access import current_client
from server.errors import ApiError, invalid
from server.remote_worker import LoadFailed, RunFailed
from server.service import Service, documented

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


class SwapBody(NullMeansAbsent):
    """Which file to serve from now on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"path": "v2.safetensors"}]})

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

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

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
        """``message`` without the place of the folder, which is internal."""
        return message.replace(f"{self._folder}/", "").replace(str(self._folder), "the checkpoint folder")

    def _inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self._folder) and path.is_file()
        except (OSError, RuntimeError):  # missing, not readable, or a circle of links
            return False


def _unusable(message: str) -> ApiError:
    return ApiError(422, "checkpoint_unusable", " ".join(message.split()), field="path")


def admin_router(service: Service, info: type[BaseModel], describe: Callable[[], BaseModel]) -> APIRouter:
    """The routes. ``server.middleware`` keeps everybody but administrators out of ``/admin``.

    Args:
        info, describe: type and content of the body of GET /info.
    """
    router = APIRouter(prefix="/admin")
    pool, settings = service.pool, service.settings
    schema = SwapBody.model_json_schema()
    body_schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    busy = False
    first_folder: Path | None = None

    def folder() -> CheckpointFolder:
        nonlocal first_folder
        if first_folder is None:  # of the first checkpoint, whatever has been swapped in since
            first_folder = settings.checkpoint_dir or service.model.path.parent
        return CheckpointFolder(first_folder)

    @router.get("/checkpoint", responses=documented(503))
    async def get_checkpoint() -> CheckpointsResponse:
        """The checkpoint that is served, and the files that could be."""
        return CheckpointsResponse(served=service.model.name, files=await asyncio.to_thread(folder().files))

    @router.post(
        "/checkpoint", response_model=info, responses=documented(409, 413, 422, 503), openapi_extra=body_schema
    )
    async def swap_checkpoint(http: HttpRequest) -> BaseModel:
        """Load another checkpoint and serve it. No request is lost: those in flight end on the one they began with."""
        nonlocal busy
        name = read_params(SwapBody, await http.body()).path
        logger.info("checkpoint %s was asked for", name, extra={"client": current_client(http)})
        if busy:
            raise ApiError(409, "swap_in_progress", "another checkpoint is being loaded; try again when it is done")
        busy = True
        try:
            place = folder()
            await pool.swap(place.find(name))
        except LoadFailed as error:
            raise _unusable(place.public(str(error))) from error
        except RunFailed as error:
            raise _unusable(f"{name}: it loads but does not run; the server's log has why") from error
        finally:
            busy = False
        return describe()

    return router
