"""``robuq-train``: teacher, qat, export and evaluate, each from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robuq_core.cli_support import reported
from train.config import TrainConfig, load_config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train W1.58Ax diffusion transformers: teacher -> qat -> export -> evaluate. Every stage reads the same "
    "YAML file, writes below its run_dir and, started again, goes on from the last saved state.",
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run (see configs/).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override one key: --set qat.lr=3e-4. Repeatable.")
]


def _load(config: Path, overrides: list[str] | None) -> TrainConfig:
    return load_config(config, overrides or [])


@app.command()
@reported
def teacher(config: ConfigOption, override: SetOption = None) -> None:
    """Train the full-precision DiT that quantisation starts from."""
    from train.stages import train_teacher

    train_teacher(_load(config, override))


@app.command()
@reported
def qat(config: ConfigOption, override: SetOption = None) -> None:
    """Quantise the teacher (ternary weights, low-bit activations) and train it on."""
    from train.stages import train_qat

    train_qat(_load(config, override))


if __name__ == "__main__":
    app()
