"""``robuq-train``: the stages of a run, together and each alone, from one YAML file."""

from __future__ import annotations

import importlib
import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robuq_core.cli_support import PackingOptions, reported, takes_params
from robuq_core.config import MAX_SEED
from robuq_core.errors import UserError

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.run import Run


class _Program(typer.Typer):
    """The console script. Beside other processes it ends without Python's own end: see :func:`train.parallel.end`."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return super().__call__(*arguments, **named)
        code: object = 0
        try:
            super().__call__(*arguments, **named)
        except SystemExit as ended:
            code = ended.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        from train.parallel import end

        end(code if isinstance(code, int) else 1)


app = _Program(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train W1.58Ax diffusion transformers: prepare -> teacher -> warmup -> sensitivity -> allocate -> qat -> "
    "export -> evaluate. 'run' runs them all. Every stage reads the same YAML file and writes below its run_dir. "
    "A rerun resumes, or skips what is up to date.",
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run (see configs/).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override one key: --set qat.lr=3e-4. Repeatable.")
]
EmaOption = Annotated[float | None, typer.Option(help="Use the weights averaged with this one of more_ema_decays.")]
RedoOption = Annotated[bool, typer.Option("--redo", help="Discard this stage's output and rerun it.")]


def _module(name: str) -> Any:
    """``train.NAME``; a plain installation serves and does not train."""
    try:
        return importlib.import_module(f"train.{name}")
    except ImportError as error:
        raise UserError(f"training is not installed ({error}); from a checkout: pip install '.[train]'") from error


def _load(config: Path, overrides: list[str] | None) -> TrainConfig:
    loaded: TrainConfig = _module("config").load_config(config, overrides or [])
    return loaded


@contextmanager
def _run(config: Path, overrides: list[str] | None, ema: float | None = None) -> Iterator[Run]:
    """The configured run, in all processes that ``torchrun`` started."""
    loaded = _load(config, overrides)
    from train.parallel import processes
    from train.run import Run

    with processes():
        yield Run(loaded, typer.echo, ema=ema)


@app.command()
@reported
def run(
    config: ConfigOption,
    override: SetOption = None,
    redo: Annotated[
        list[str] | None, typer.Option(help="Rerun this stage and all after it. Repeatable.", metavar="STAGE")
    ] = None,
) -> None:
    """Run every stage, in order; skip those that are up to date."""
    with _run(config, override) as whole:
        from train.stages import BY_NAME

        unknown = sorted(set(redo or ()) - set(BY_NAME))
        if unknown:
            raise UserError(f"--redo {unknown[0]}: no such stage; one of {', '.join(BY_NAME)}")
        whole.until(redo=redo or ())


@app.command()
@reported
def prepare(config: ConfigOption, override: SetOption = None) -> None:
    """Convert the data set into shards of pixels or latents, which training maps into memory."""
    with _run(config, override) as whole:
        whole.prepare()


def _add_stage(name: str, about: str) -> None:
    @app.command(name, help=about)
    @reported
    def stage(config: ConfigOption, override: SetOption = None, redo: RedoOption = False) -> None:
        with _run(config, override) as whole:
            whole.alone(name, redo)


_add_stage("teacher", "Train the full-precision DiT that quantisation starts from, or import its weights.")
_add_stage("warmup", "Train the quantised teacher briefly at one uniform width; sensitivities are measured on it.")
_add_stage("sensitivity", "Measure the loss of each layer at each activation width.")
_add_stage("allocate", "Choose the width of each layer within allocate.average_bits, and print the table.")
_add_stage("qat", "Quantise the teacher (ternary weights, low-bit activations) and continue training.")


@app.command()
@reported
def export(
    config: ConfigOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the packed file here; default: RUN_DIR/model.safetensors."),
    ] = None,
    ema: EmaOption = None,
    override: SetOption = None,
    redo: RedoOption = False,
) -> None:
    """Pack the trained student into one file that robuq and robuq-serve load."""
    with _run(config, override, ema) as whole:
        if out is None:
            if ema is not None:
                raise UserError("--ema needs --out: RUN_DIR/model.safetensors has the weights of ema_decay")
            whole.alone("export", redo)
            return
        from train.stages import BY_NAME
        from train.stages import export as write

        whole.check_lineage(BY_NAME["export"])
        write(whole, out)
        typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")


@app.command()
@reported
def evaluate(
    config: ConfigOption,
    model: Annotated[
        str | None, typer.Option(help="teacher, student or packed; default: the latest in the run.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A packed file, or, with --model, a kept state RUN_DIR/states/STAGE/step-....")
    ] = None,
    classes: Annotated[int, typer.Option(min=1, help="Agreement: number of random classes.")] = 200,
    seed: Annotated[int, typer.Option(help="Agreement: seed of the classes and of the samples.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Also write a contact sheet of the first 64 samples.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Local Inception-v3 weights: adds FID, sFID, IS, precision and recall.")
    ] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the samples as npz files into this folder.")] = None,
    agreement_only: Annotated[bool, typer.Option("--agreement-only", help="Skip the distances.")] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Settings of published figures: ddpm-cfg-1.5, ddpm-cfg-4.0 (250 steps, 50,000 samples) or "
            "quick (50 steps, 10,000)."
        ),
    ] = None,
    ema: EmaOption = None,
    override: SetOption = None,
) -> None:
    """Measure samples: agreement with their class, and distances to the photos with intervals over seeds.

    Prints JSON and keeps it in RUN_DIR/evaluation.json. Needs no download: FD-EffNet is on EfficientNet-Lite0 features.
    Under torchrun every process generates its share of the samples.
    """
    protocols = {} if protocol is None else _module("config").PROTOCOLS
    if protocol is not None and protocol not in protocols:
        raise UserError(f"--protocol {protocol}: choose one of {', '.join(protocols)}")
    with _run(config, [*protocols.get(protocol, ()), *(override or [])], ema) as whole:
        from train.evaluation.run import evaluate_run
        from train.parallel import rank

        options: dict[str, Any] = {"sheet": sheet, "inception": inception, "npz": npz, "agreement_only": agreement_only}
        entry = evaluate_run(whole, model, checkpoint=checkpoint, classes=classes, seed=seed, **options)
        if rank() == 0:
            typer.echo(json.dumps(entry, indent=2))


@app.command()
@reported
def diagnose(
    config: ConfigOption,
    model: Annotated[str | None, typer.Option(help="teacher or student; default: the later in the run.")] = None,
    override: SetOption = None,
) -> None:
    """Report how near to normal each layer's input is, before and after rotation, and what quantising costs.

    Prints the output error of every layer with and without rotation, and the spread of every head's logits.
    Writes RUN_DIR/diagnosis/MODEL.json, and MODEL/ with a picture of each layer.
    """
    with _run(config, override) as whole:
        from train.diagnose import diagnose as diagnosed
        from train.diagnose import report
        from train.parallel import on_first

        on_first(lambda: report(diagnosed(whole, model), whole.folder / "diagnosis"))


@app.command()
@reported
def memory(
    config: ConfigOption,
    stage: Annotated[str, typer.Option(help="teacher, warmup or qat.")] = "qat",
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the batch and, with fsdp, the model.")
    ] = 1,
    teraflops: Annotated[
        float, typer.Option(min=1e-3, help="Sustained by one process; 51 is an A100 at half of fast-DiT's speed.")
    ] = 51.0,
    override: SetOption = None,
) -> None:
    """Count the memory that a training step takes in one process, and the time of the stage. Needs no data."""
    loaded = _load(config, override)
    from train.memory import memory_table, time_line

    typer.echo(memory_table(loaded, stage, processes))
    typer.echo(time_line(loaded, stage, processes, teraflops))


@app.command()
@reported
def keys() -> None:
    """Print every key of the configuration as YAML, with its default and meaning."""
    typer.echo(_module("config").annotated_defaults(), nl=False)


@app.command()
@reported
@takes_params(PackingOptions, "steps")
def ptq(
    source: Annotated[
        Path, typer.Argument(help="Official .pt of DiT, SiT or REPA; diffusers folder; or RUN_DIR/states/teacher.")
    ],
    target: Annotated[Path, typer.Argument(help="The packed file to write, x.safetensors.")],
    steps: Annotated[
        int, typer.Option(min=0, help="Of Adam, end to end; 0 fits layer by layer alone, and takes less memory.")
    ] = 200,
    inputs: Annotated[
        int | None, typer.Option(min=1, help="Inputs of the teacher's samples; default: 128 to 2,048, by size.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the samples and the steps.")] = 0,
    *,
    params: PackingOptions,
) -> None:
    """Pack full-precision weights, calibrated on samples that they generate themselves: no data set is needed."""
    from rich.progress import Progress

    ptq = _module("ptq")
    calibration, options = ptq.Calibration(steps, inputs, seed), params.hints
    options |= {"class_names": params.names, "decoder": params.decoder_kind}
    with Progress(transient=True) as progress:
        task = progress.add_task("sampling", total=None)
        options["on_layer"] = lambda name: progress.update(task, description=name, advance=1)
        header = ptq.pack_calibrated(source, target, calibration, params.quant, params.defaults, **options)
    typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)")
    off = header.provenance["relative_error_on_own_samples"]
    if off is not None:
        typer.echo(f"predictions on the teacher's own samples, not calibrated on: {off:.1%} (RMS) off the original")


@app.command()
@reported
def ablate(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the study.")] = Path(
        "configs/ablations.yaml"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study's runs.")] = Path("runs/ablations"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for ablations.md, ablations.json and the plot; default: OUT.")
    ] = None,
    overrides: SetOption = None,
    report_only: Annotated[bool, typer.Option(help="Train nothing: write the report of what is done.")] = False,
) -> None:
    """Train and measure every row of an ablation study, and write its tables.

    Finished rows are kept, so a stopped study continues; several processes may share one folder."""
    from train.ablations.report import write_report
    from train.ablations.study import Study, load_study

    study = Study(load_study(config, overrides), out)
    busy = 0 if report_only else study.run()
    typer.echo(f"wrote {write_report(study, report or out)}")
    if busy:
        typer.echo(f"{busy} rows are being trained by other processes: start again when they are done")


if __name__ == "__main__":
    app()
