"""Every setting of the server, from ``ROBUQ_*`` variables or from the command line, which wins."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import DirectoryPath, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from robuq_core.errors import UserError
from robuq_core.params import MAX_IMAGES

# Beyond it a little more load costs a lot of waiting: at 0.7 an image takes 3.3 times as long as alone, at 0.9 ten.
TARGET_UTILISATION = 0.7

LogLevel = Literal["debug", "info", "warning", "error"]

_NO_HOST = re.compile(r"[/?#@\\\s]")
# What a browser on this machine may call a server that listens on a loopback address, beside its addresses.
LOOPBACK_HOSTS = ("localhost", "*.localhost")


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, a name or an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=64)
def split_host(header: str) -> tuple[str, int | None]:
    """Name or address in lower case, without brackets or a final dot, and port of a ``Host`` header.

    What cannot be read is returned as an empty name.
    """
    header = header.strip()
    if _NO_HOST.search(header):
        return "", None
    try:
        parts = urlsplit("//" + header)
        return (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        return "", None


class Settings(BaseSettings):
    """Frozen once made. Durations in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="ROBUQ_", env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False
    )

    checkpoint: Path | None = Field(
        None,
        description="Packed checkpoint to serve: a file, a folder with one, the name of a bundled one, or an id of the "
        "Hugging Face hub. Default: imagenet, which is bundled.",
    )
    decoder: Path | None = Field(
        None,
        description="Diffusers folder of the autoencoder that decodes latents; default: the folder vae "
        "beside the checkpoint. Pixel models need none.",
    )
    backend: str = Field(
        "auto", description="Kernels to run: cpu, triton or reference; auto picks the fastest that works here."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; default: the backend's choice.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Copies of the model behind one queue, each in a process: one per GPU or group of CPU cores.",
    )
    max_batch_rows: int = Field(
        32, ge=2, le=1024, description="Maximum rows per forward of a replica; an image with guidance takes two."
    )
    target_step_s: float | None = Field(
        None,
        gt=0,
        description="Maximum seconds per step; batches are kept small enough. Default: no limit.",
    )
    max_queue_images: int = Field(
        256, ge=MAX_IMAGES, description="Maximum images waiting for their first step; above it clients get 429."
    )
    request_timeout_s: float = Field(
        300.0, gt=0, description="Seconds until a request fails with 504; its timeout_s may be shorter."
    )
    priority_ageing_s: float = Field(
        5.0, gt=0, description="Seconds of waiting that count as much as one level of priority."
    )
    drain_timeout_s: float = Field(
        25.0, ge=0, description="Seconds after SIGTERM for the requests in flight to end; the rest get 503."
    )
    stall_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds after which a step or a decoder counts as hung: its worker is killed and replaced. Set it "
        "above your slowest full batch.",
    )
    load_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds after which loading a checkpoint counts as hung. Set it above your slowest download.",
    )
    embed_settings: bool = Field(True, description="Store checkpoint, class, seed and settings in image files.")
    decode_threads: int = Field(
        1,
        ge=1,
        le=64,
        description="Threads per worker that decode and encode images; raise it only if they cannot keep up.",
    )
    max_body_bytes: int = Field(65536, ge=1024, description="Maximum size of a request body; above it clients get 413.")
    max_connections: int = Field(
        1000, ge=1, description="Maximum open connections; above it clients get 503, except health probes."
    )
    max_connections_per_peer: int = Field(
        500, ge=1, description="Maximum open connections per client address (IPv6: per /64)."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of reverse proxies. Their X-Forwarded-For is logged, and "
        "--max-connections-per-peer does not apply to them.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Values of the Host header to accept, without the port; *.example.org for subdomains, * for any. "
        "Default: the names of this machine when --host is a loopback address, else any.",
    )
    api_keys_file: Path | None = Field(
        None, description="File of hashed API keys, made by robuq-serve keys; without it no key is needed."
    )
    checkpoint_dir: DirectoryPath | None = Field(
        None, description="Folder that POST /admin/checkpoint may load from; default: that of the first checkpoint."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins of other sites whose pages may call this server, such as https://example.org; * for any.",
    )
    cache_bytes: int = Field(
        2**28,
        ge=0,
        description="Maximum bytes of images to keep for repeated requests with a seed. 0 turns this off, and also the "
        "sharing of equal requests in flight.",
    )
    otel_endpoint: str | None = Field(
        None, description="OTLP/HTTP collector for traces, such as http://localhost:4318; needs the extra robuq[otel]."
    )
    log_level: LogLevel = Field("info", description="Minimum severity of log lines: debug, info, warning or error.")

    @field_validator("cors_origins", "trusted_proxies", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        """A variable holds several with spaces between them."""
        return values.split() if isinstance(values, str) else values

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ip_network(network, strict=False)
            except ValueError:
                raise ValueError(f"{network!r} must be an address or a network, such as 10.0.0.0/8") from None
        return networks

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            name = host.removeprefix("*.")
            if host != "*" and (not name or split_host(f"[{name}]" if ":" in name else name) != (name, None)):
                raise ValueError(f"{host!r} must be a host in lower case without a port, such as example.org")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # A browser sends scheme, host and port alone, so that anything else here would never match.
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"{origin!r} is not an origin; write it like https://example.org, without a path")
        return origins

    def trusts(self, address: str) -> bool:
        """Whether ``address`` is a trusted proxy's."""
        try:
            return any(ip_address(address) in ip_network(proxy, strict=False) for proxy in self.trusted_proxies)
        except ValueError:
            return False

    def accepts_host(self, header: str) -> bool:
        """Whether a request with this ``Host`` header is for this server.

        DNS rebinding makes a page of another site the same origin as this server, but it cannot change the header.
        """
        name = split_host(header)[0]
        hosts = self.allowed_hosts or (LOOPBACK_HOSTS if is_loopback(self.host) else ("*",))
        return any(host in ("*", name) or (host[:2] == "*." and name.endswith(host[1:])) for host in hosts) or (
            not self.allowed_hosts and is_loopback(name)
        )


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
