"""``robuq-train``: teacher, qat, export and evaluate, each from one YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robuq_core.cli_support import reported
from robuq_core.errors import UserError

if TYPE_CHECKING:
    from train.config import TrainConfig

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
    try:
        from train.config import load_config
    except ImportError as error:  # the plain installation serves and does not train
        raise UserError(f"training is not installed ({error}): pip install 'robuq[train]'") from error
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


@app.command()
@reported
def export(
    config: ConfigOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The packed .safetensors file to write.")],
    override: SetOption = None,
) -> None:
    """Pack the trained student into one file that robuq and robuq-serve load."""
    from train.stages import export as write

    write(_load(config, override), out)
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")


@app.command()
@reported
def evaluate(
    config: ConfigOption,
    checkpoint: Annotated[Path | None, typer.Option(help="A packed file; without it, the teacher is measured.")] = None,
    classes: Annotated[int, typer.Option(min=1, help="How many classes to draw at random.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the classes and of the samples.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet of the first 64 samples.")] = None,
    override: SetOption = None,
) -> None:
    """Share of samples whose nearest training photo is of the asked class, and the classifier's agreement.

    Features are EfficientNet-Lite0's. Prints JSON.
    """
    from robuq_core.pipeline import Sampler
    from train.evaluate import evaluate as measure
    from train.evaluate import plain_sampler
    from train.stages import load_teacher, read_images

    loaded = _load(config, override)
    if checkpoint is None:
        sampler = plain_sampler(load_teacher(loaded), loaded, "teacher")
    else:
        sampler = Sampler.from_checkpoint(checkpoint)
    result = measure(sampler, loaded, read_images(loaded), classes, seed, sheet)
    typer.echo(json.dumps({"model": sampler.checkpoint_name, "seed": seed, **result.as_dict()}, indent=2))


if __name__ == "__main__":
    app()
