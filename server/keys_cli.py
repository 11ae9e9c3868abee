"""``robuq-serve keys``: make, list and revoke API keys. A running server notices at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from robuq_core.cli_support import reported
from robuq_core.errors import UserError
from server.keys import create_key, read_keys, revoke_key

app = typer.Typer(
    help="Make, list and revoke API keys. A running server notices at once.", no_args_is_help=True, add_completion=False
)

_File = Annotated[
    Path | None,
    typer.Option("--api-keys-file", envvar="ROBUQ_API_KEYS_FILE", help="The file that the server is started with."),
]
_Name = Annotated[str, typer.Argument(help="Who holds the key: shown in logs, and shares the server under this name.")]


def _path(given: Path | None) -> Path:
    if given is None:
        raise UserError("give the file of keys with --api-keys-file FILE or ROBUQ_API_KEYS_FILE")
    return given


def _per_minute(amount: int | None) -> str:
    return "-" if amount is None else str(amount)


@app.command()
@reported
def create(
    name: _Name,
    api_keys_file: _File = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="generate, admin or read, more than once if need be; every key may read (/info, /metrics). "
            "generate if not given."
        ),
    ] = None,
    images_per_minute: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="No limit if not given.")] = None,
) -> None:
    """Make a key and print it, this once: the file keeps only its hash."""
    path = _path(api_keys_file)
    key = create_key(
        path,
        name,
        scopes=scope or ("generate",),
        images_per_minute=images_per_minute,
        requests_per_minute=requests_per_minute,
    )
    typer.echo(key)
    typer.secho(f"keep it now: {path} holds only its hash", err=True, fg=typer.colors.YELLOW)


@app.command("list")
@reported
def list_keys(api_keys_file: _File = None) -> None:
    """Show names, scopes and limits."""
    table = Table("name", "scopes", "images/min", "requests/min", "created", box=box.SIMPLE)
    for key in read_keys(_path(api_keys_file)):
        table.add_row(
            key.name,
            ", ".join(key.scopes),
            _per_minute(key.images_per_minute),
            _per_minute(key.requests_per_minute),
            f"{key.created:%Y-%m-%d}",
        )
    Console().print(table)


@app.command()
@reported
def revoke(name: _Name, api_keys_file: _File = None) -> None:
    """Take a key back: requests with it get 401 from now on."""
    revoke_key(_path(api_keys_file), name)
    typer.echo(f"revoked {name}")
