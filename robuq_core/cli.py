"""``robuq``: draw from, look into and time a packed checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from robuq_core.bench.cli import app as bench_app
from robuq_core.cli_support import reported
from robuq_core.config import MAX_SEED, NUM_TRAIN_TIMESTEPS, SamplerName

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run diffusion transformers with ternary weights and low-bit activations from one packed file.",
)

app.add_typer(bench_app, name="bench")

CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", "-c", help="Packed .safetensors file; default: the bundled one.")
]
BackendOption = Annotated[
    str, typer.Option(help="Kernel backend: auto, cpu (native), triton (NVIDIA GPU) or reference (torch).")
]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cuda:0; default: the backend's choice.")]
StepsOption = Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; default: the checkpoint's.")]
ScaleOption = Annotated[float | None, typer.Option(min=0, max=20, help="Guidance; 1 is none, and costs half.")]
SamplerOption = Annotated[SamplerName | None, typer.Option(help="Default: the checkpoint's.")]
IntervalOption = Annotated[
    tuple[int, int], typer.Option(metavar="LOW HIGH", help="Guide at timesteps LOW..HIGH alone (arXiv 2404.07724).")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]


@app.command()
@reported
def sample(
    class_ids: Annotated[list[int], typer.Argument(help="One image a class id, e.g. 207 360.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path("samples"),
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Image i uses seed + i.")] = None,
    steps: StepsOption = None,
    guidance_scale: ScaleOption = None,
    sampler: SamplerOption = None,
    guidance_interval: IntervalOption = (0, NUM_TRAIN_TIMESTEPS - 1),
    checkpoint: CheckpointOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw one image a class into PNG files; what is not given takes the checkpoint's default."""
    from rich.progress import Progress

    from robuq_core.pipeline import Sampler

    loaded = Sampler.from_checkpoint(checkpoint, backend=backend, threads=threads, device=device)
    with Progress() as progress:
        task = progress.add_task("sampling", total=steps or loaded.defaults.steps)
        images = loaded.generate(
            class_ids,
            seed,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            guidance_interval=guidance_interval,
            on_step=lambda: progress.advance(task),
        )
    out.mkdir(parents=True, exist_ok=True)
    for i, (class_id, image) in enumerate(zip(class_ids, images, strict=True)):
        path = out / f"{i:04d}_class{class_id}.png"
        image.save(path)
        typer.echo(path)


@app.command()
@reported
def compare(
    guidance_interval: IntervalOption,
    images: Annotated[int, typer.Option(min=1, help="How many; image i draws class i with seed i.")] = 16,
    steps: StepsOption = None,
    guidance_scale: ScaleOption = None,
    sampler: SamplerOption = None,
    checkpoint: CheckpointOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = None,
) -> None:
    """Print what guidance at some timesteps alone saves, and how far its pictures are from full guidance."""
    from robuq_core.compare import compare_guidance_interval
    from robuq_core.pipeline import Sampler

    loaded = Sampler.from_checkpoint(checkpoint, backend=backend, threads=threads, device=device)
    classes = [i % loaded.num_classes for i in range(images)]
    result = compare_guidance_interval(loaded, classes, guidance_interval, steps=steps, guidance_scale=guidance_scale,
                                       sampler_name=sampler)  # fmt: skip
    typer.echo(
        f"{result.images} images: {result.rows} of {result.rows_full} model rows, "
        f"{result.seconds:.2f} of {result.seconds_full:.2f} s, PSNR {result.psnr_db:.1f} dB"
    )


@app.command("inspect")
@reported
def inspect_command(
    checkpoint: Annotated[Path | None, typer.Argument(help="Packed file; default: the bundled one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON.")] = False,
) -> None:
    """Print the shape, the bit table, the average activation bits and the size by part of a packed file."""
    from rich.console import Console
    from rich.table import Table

    from robuq_core.inspect import inspect_checkpoint
    from robuq_core.pipeline import bundled_checkpoint

    path = checkpoint or bundled_checkpoint()
    report = inspect_checkpoint(path)
    header = report.header
    if as_json:
        typer.echo(header.model_dump_json(indent=2))
        return
    console = Console()
    for title, section in (("model", header.model), ("quantisation", header.quant), ("diffusion", header.diffusion),
                           ("sampler", header.sampler)):  # fmt: skip
        values = ", ".join(f"{key} {value}" for key, value in section.model_dump().items() if value != {})
        console.print(f"[bold]{title}[/bold]: {values}")
    console.print(f"[bold]average activation bits[/bold] (MAC-weighted): {header.average_activation_bits:.3f}")
    bits = Table("block", "qkv", "proj", "fc1", "fc2", "adaLN", title="activation bits")
    widths = list(header.bits.values())
    for i in range(header.model.depth):
        bits.add_row(str(i), *map(str, widths[5 * i : 5 * i + 5]))
    console.print(bits)
    sizes = Table("part", "bytes", "share", title=f"{path.name}: {report.file_bytes:,} bytes")
    for part, size in sorted(report.bytes_by_part.items(), key=lambda item: -item[1]):
        sizes.add_row(part, f"{size:,}", f"{size / report.file_bytes:.1%}")
    console.print(sizes)
    console.print(f"{report.compression:.1f} times smaller than FP32 ({report.fp32_bytes:,} bytes)")
    console.print(f"[bold]provenance[/bold]: {json.dumps(header.provenance, default=str)}")


if __name__ == "__main__":
    app()
