"""``robuq-serve``: the server from the command line, and the commands for API keys."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from robuq_core.cli_support import reported
from server.capacity import capacity
from server.keys import create_key, read_keys, revoke_key
from server.settings import Settings, is_loopback, load_settings

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
keys_app = typer.Typer(
    help="Create, list and revoke API keys. A running server applies changes immediately.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(keys_app, name="keys")
app.command("capacity")(capacity)

_HELP = """Serve images of a packed checkpoint over HTTP.

Without options it serves the bundled checkpoint on http://127.0.0.1:8000:

    robuq-serve

    curl localhost:8000/generate -d '{"class_id": 207}'
    curl localhost:8000/generate -d '{"class_id": 207}' \\
        -H 'Accept: image/png' -o 207.png

**/** is a web playground, **/docs** describes every route, **/info** the model, its defaults and limits;
**/metrics** is for Prometheus, **/health** for a liveness probe, **/ready** for a readiness probe.

Anyone who can reach the port can use the server. Before others can, make keys and start with **--api-keys-file**:

    robuq-serve keys create alice --images-per-minute 60 --api-keys-file keys.json

    robuq-serve --host 0.0.0.0 --api-keys-file keys.json

SIGTERM drains: new requests are rejected, those in flight have --drain-timeout-s to end, then the exit code is 0. A
start-up failure exits with code 2 and one line on standard error, workers that keep dying with code 1.

Every option can be given as a variable, ROBUQ_PORT for --port. Options win.
"""


def _takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting; :class:`Settings` alone holds its type, text and default."""

    @functools.wraps(command)
    def wrapper(context: typer.Context, **given: Any) -> None:
        if context.invoked_subcommand is None:
            command(load_settings(given))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        kind: Any
        kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else [field.annotation]
        (kind,) = (each for each in kinds if each is not NoneType)
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif kind == tuple[str, ...]:
            kind = list[str]
        shown = typer.Option(
            f"{option}/--no-{option[2:]}" if kind is bool else option,
            help=field.description,
            envvar=f"ROBUQ_{name.upper()}",
            show_default=False if field.default in (None, ()) else str(field.default),
        )
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, shown]))
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


@app.callback(help=_HELP, invoke_without_command=True)
@reported
@_takes_settings
def main(settings: Settings) -> None:
    # Until the server takes over, a signal just ends the process; as PID 1 of a container it would be ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    from server.launch import bind, prepare
    from server.logs import configure_logging

    configure_logging(settings.log_level)
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)  # before the checkpoint, so that a mistake shows at once
    elif not is_loopback(settings.host):
        logger.warning("anyone who can reach %s can use this server: no --api-keys-file", settings.host)
    sockets = bind(settings.host, settings.port)
    prepared = prepare(settings)  # the workers load while this process imports its own part
    gc.disable()  # what an import makes, stays
    from server.lifecycle import serve

    raise typer.Exit(serve(settings, sockets, prepared))


_File = Annotated[
    Path,
    typer.Option("--api-keys-file", envvar="ROBUQ_API_KEYS_FILE", help="The file that the server is started with."),
]
_Name = Annotated[str, typer.Argument(help="Who holds the key: appears in logs; fair shares and limits go by it.")]


@keys_app.command()
@reported
def create(
    name: _Name,
    api_keys_file: _File,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, admin or read; repeat for several. Every key may read (/info, /metrics). Default: generate."
        ),
    ] = None,
    images_per_minute: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
) -> None:
    """Make a key and print it, this once: the file keeps only its hash."""
    limits = {"images_per_minute": images_per_minute, "requests_per_minute": requests_per_minute}
    typer.echo(create_key(api_keys_file, name, scopes=scope or ("generate",), **limits))
    typer.secho(f"keep it now: {api_keys_file} holds only its hash", err=True, fg=typer.colors.YELLOW)


@keys_app.command("list")
@reported
def list_keys(api_keys_file: _File) -> None:
    """Show names, scopes and limits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "scopes", "images/min", "requests/min", "created", box=box.SIMPLE)
    for key in read_keys(api_keys_file):
        limits = (str(limit or "-") for limit in (key.images_per_minute, key.requests_per_minute))
        table.add_row(key.name, ", ".join(key.scopes), *limits, f"{key.created:%Y-%m-%d}")
    Console().print(table)


@keys_app.command()
@reported
def revoke(name: _Name, api_keys_file: _File) -> None:
    """Revoke a key: requests with it get 401 from now on."""
    revoke_key(api_keys_file, name)
    typer.echo(f"revoked {name}")
