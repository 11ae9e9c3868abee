"""``robuq-serve``: the server from the command line."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robuq_core.cli_support import reported
from server import capacity_cli, keys_cli
from server.keys import read_keys
from server.settings import LogFormat, LogLevel, Settings, is_loopback, load_settings

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
app.add_typer(keys_cli.app, name="keys")
app.command("capacity")(capacity_cli.capacity)

_HELP = """Serve images of a packed checkpoint over HTTP.

Without options it serves the bundled checkpoint on http://127.0.0.1:8000:

    robuq-serve

    curl localhost:8000/generate -d '{"class_id": 207}'
    curl localhost:8000/generate -d '{"class_id": 207}' \\
        -H 'Accept: image/png' -o 207.png

**/** is a page to draw with, **/docs** describes every route, **/info** the model, its defaults and limits;
**/metrics** is for Prometheus, **/health** for a liveness probe, **/ready** for a readiness probe: green after warm-up.

Whoever reaches the port may draw. Before others do, make keys and start with **--api-keys-file**:

    robuq-serve keys create alice --images-per-minute 60 --api-keys-file keys.json

    robuq-serve --host 0.0.0.0 --api-keys-file keys.json

SIGTERM drains: no new requests, those in flight end within --drain-timeout-s, exit code 0. A start-up failure exits
with code 2 and one line on standard error; an engine that dies exits with code 1.

Every option can be given as a variable, ROBUQ_PORT for --port. Options win.
"""


def _option(name: str) -> Any:
    """An option that mirrors the setting ``name``; Settings alone holds its text and default."""
    field, option = Settings.model_fields[name], "--" + name.replace("_", "-")
    return typer.Option(
        f"{option}/--no-{option[2:]}" if field.annotation is bool else option,
        help=field.description,
        envvar=f"ROBUQ_{name.upper()}",
        show_default=False if field.default in (None, ()) else str(field.default),
    )


@app.callback(help=_HELP, invoke_without_command=True)
@reported
def main(
    context: typer.Context,
    checkpoint: Annotated[Path | None, _option("checkpoint")] = None,
    decoder: Annotated[Path | None, _option("decoder")] = None,
    backend: Annotated[str | None, _option("backend")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    replicas: Annotated[int | None, _option("replicas")] = None,
    max_batch_rows: Annotated[int | None, _option("max_batch_rows")] = None,
    target_step_s: Annotated[float | None, _option("target_step_s")] = None,
    max_queue_images: Annotated[int | None, _option("max_queue_images")] = None,
    request_timeout_s: Annotated[float | None, _option("request_timeout_s")] = None,
    priority_ageing_s: Annotated[float | None, _option("priority_ageing_s")] = None,
    drain_timeout_s: Annotated[float | None, _option("drain_timeout_s")] = None,
    stall_timeout_s: Annotated[float | None, _option("stall_timeout_s")] = None,
    load_timeout_s: Annotated[float | None, _option("load_timeout_s")] = None,
    embed_settings: Annotated[bool | None, _option("embed_settings")] = None,
    decode_threads: Annotated[int | None, _option("decode_threads")] = None,
    max_body_bytes: Annotated[int | None, _option("max_body_bytes")] = None,
    max_connections: Annotated[int | None, _option("max_connections")] = None,
    max_connections_per_peer: Annotated[int | None, _option("max_connections_per_peer")] = None,
    trusted_proxies: Annotated[list[str] | None, _option("trusted_proxies")] = None,
    allowed_hosts: Annotated[list[str] | None, _option("allowed_hosts")] = None,
    api_keys_file: Annotated[Path | None, _option("api_keys_file")] = None,
    checkpoint_dir: Annotated[Path | None, _option("checkpoint_dir")] = None,
    cors_origins: Annotated[list[str] | None, _option("cors_origins")] = None,
    cache_bytes: Annotated[int | None, _option("cache_bytes")] = None,
    otel_endpoint: Annotated[str | None, _option("otel_endpoint")] = None,
    log_level: Annotated[LogLevel | None, _option("log_level")] = None,
    log_format: Annotated[LogFormat | None, _option("log_format")] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    settings = load_settings({name: value for name, value in locals().items() if name in Settings.model_fields})
    # Until the server takes over, a signal just ends the process; as PID 1 of a container it would be ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    from server.launch import bind, prepare
    from server.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)  # before the checkpoint, so that a mistake shows at once
    elif not is_loopback(settings.host):
        logger.warning("anyone who can reach %s can use this server: no --api-keys-file", settings.host)
    sockets = bind(settings.host, settings.port)
    prepared = prepare(settings)  # the workers load while this process imports its own part
    gc.disable()  # what an import makes, stays
    from server.lifecycle import serve

    raise typer.Exit(serve(settings, sockets, prepared))
