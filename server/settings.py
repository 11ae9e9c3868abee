"""Every setting of the server, from ``ROBUQ_*`` variables or from the command line, which wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import DirectoryPath, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from robuq_core.errors import UserError

# Images that one request may ask for; the queue must hold at least one such request.
MAX_IMAGES = 16

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]


class Settings(BaseSettings):
    """Frozen once made. Durations in seconds."""

    model_config = SettingsConfigDict(env_prefix="ROBUQ_", env_ignore_empty=True, extra="ignore", frozen=True)

    checkpoint: Path | None = Field(
        None,
        description="Packed checkpoint to serve: a file, a folder that holds one, or an id of the Hugging Face hub; "
        "the bundled one if not given.",
    )
    decoder: Path | None = Field(
        None,
        description="Diffusers folder of the autoencoder that turns latents into pixels; the folder vae beside the "
        "checkpoint if not given. Checkpoints that draw pixels need none.",
    )
    backend: str = Field(
        "auto", description="Kernels to run: cpu, triton or reference; auto picks the fastest that works here."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; the backend's choice if not given.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    replicas: int = Field(
        1, ge=1, le=64, description="Copies of the model behind one queue: one a GPU, or one a group of CPU cores."
    )
    max_batch_rows: int = Field(
        32, ge=2, le=1024, description="Most rows in one forward of a replica; an image with guidance takes two."
    )
    target_step_s: float | None = Field(
        None, gt=0, description="Keep batches so small that a step takes at most this; no limit if not given."
    )
    max_queue_images: int = Field(
        256, ge=MAX_IMAGES, description="Most images that may wait for their first step; beyond it clients get 429."
    )
    request_timeout_s: float = Field(
        300.0, gt=0, description="Seconds until a request is given up with 504; its timeout_s may ask for less."
    )
    priority_ageing_s: float = Field(
        5.0, gt=0, description="Seconds of waiting that weigh as much as one level of priority."
    )
    drain_timeout_s: float = Field(
        25.0, ge=0, description="Seconds that SIGTERM leaves to the requests in flight; the rest get 503."
    )
    stall_timeout_s: float = Field(
        120.0, gt=0, description="A forward that takes longer turns /ready red; set it above your slowest full batch."
    )
    decode_threads: int = Field(
        1, ge=1, le=64, description="Threads that decode and encode images; more only where they cannot keep up."
    )
    max_body_bytes: int = Field(65536, ge=1024, description="Longest request body; beyond it clients get 413.")
    max_connections: int = Field(1000, ge=1, description="Most open connections; beyond it clients get 503.")
    api_keys_file: Path | None = Field(
        None, description="File of hashed API keys, made by robuq-serve keys; without it the server is open."
    )
    checkpoint_dir: DirectoryPath | None = Field(
        None, description="Folder that POST /admin/checkpoint may load from; that of the first checkpoint if not given."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins of other sites whose pages may call this server, such as https://example.org; * for any.",
    )
    idempotency_ttl_s: float = Field(
        600.0, ge=0, description="Seconds that an answer is kept for a repeated Idempotency-Key; 0 turns it off."
    )
    otel_endpoint: str | None = Field(
        None, description="OTLP/HTTP collector for traces, such as http://localhost:4318; needs the extra robuq[otel]."
    )
    log_level: LogLevel = Field("info", description="Least severe log line: debug, info, warning or error.")
    log_format: LogFormat = Field("json", description="json (one object a line) or text.")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, origins: Any) -> Any:
        """A variable holds several with spaces between them."""
        return origins.split() if isinstance(origins, str) else origins

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # A browser sends scheme, host and port alone, so that anything else here would never match.
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"{origin!r} is no origin; write it like https://example.org, without a path")
        return origins


def load_settings(given: dict[str, Any]) -> Settings:
    """Settings from what the command line gave; the rest from ``ROBUQ_*`` variables and defaults.

    Raises:
        UserError: a value out of range; it names the option and the variable.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = str(fault["loc"][0])
        message = fault["msg"].removeprefix("Value error, ")
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} (or ROBUQ_{name.upper()}): {message}, got {fault['input']!r}") from None
