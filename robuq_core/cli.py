"""``robuq``: generate from, inspect, convert and time a packed checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from robuq_core.bench.cli import app as bench_app
from robuq_core.cli_support import PackingOptions, given, reported, takes_params
from robuq_core.config import SamplerConfig
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.params import ImageParams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run diffusion transformers with ternary weights and low-bit activations from one packed file.",
)

app.add_typer(bench_app, name="bench")

_SOURCES = "Packed file, folder with one, bundled name (imagenet, glyphs) or hub id; default: imagenet."
CheckpointOption = Annotated[Path | None, typer.Option("--checkpoint", "-c", help=_SOURCES)]
DecoderOption = Annotated[
    Path | None,
    typer.Option(help="Diffusers folder of a latent model's autoencoder; default: the folder vae next to the file."),
]
BackendOption = Annotated[
    str, typer.Option(help="Kernel backend: auto, cpu (native), triton (NVIDIA GPU) or reference (torch).")
]
DeviceOption = Annotated[str | None, typer.Option(help="Device, such as cuda:0; default: the backend's choice.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]


@app.command()
@reported
@takes_params(ImageParams, "class_id", "class_name")
def sample(
    class_ids: Annotated[
        list[str] | None,
        typer.Argument(help="Classes by id or name, such as 207 goldfish; none for a model without classes."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path("samples"),
    checkpoint: CheckpointOption = None,
    decoder: DecoderOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    embed_settings: Annotated[
        bool,
        typer.Option(help="Store checkpoint, class, seed and all settings in each file, for robuq inspect."),
    ] = True,
    *,
    params: ImageParams,
) -> None:
    """Generate one PNG image per class; options that are not given take the checkpoint's defaults."""
    import numpy as np
    from rich.progress import Progress

    from robuq_core.images import encode_image
    from robuq_core.pipeline import Sampler

    loaded = Sampler.from_checkpoint(checkpoint, decoder=decoder, backend=backend, threads=threads, device=device)
    asked: list[int | str | None] = [int(name) if name.lstrip("-").isdigit() else name for name in class_ids or ()]
    params = params.resolved(loaded.defaults)
    classes = [loaded.class_id(name) for name in asked or [None] for _ in range(params.num_images)]
    with Progress() as progress:
        task = progress.add_task("sampling", total=params.steps)
        images = loaded.generate(classes, on_step=lambda: progress.advance(task), **params.given | {"num_images": 1})
    out.mkdir(parents=True, exist_ok=True)
    for i, (class_id, image) in enumerate(zip(classes, images, strict=True)):
        path = out / f"{i:04d}_class{class_id}.png"
        settings = loaded.settings_of(params.spec(class_id, i)) if embed_settings else None
        with replacing(path) as part:
            part.write_bytes(encode_image(np.asarray(image), "png", settings))
        typer.echo(path)
    if (spent := loaded.timings) is not None:
        seconds = f"sampling {spent.sampling_s:.3f} s, decoding {spent.decode_s:.3f} s"
        typer.echo(f"{len(images)} images: {seconds}", err=True)


@app.command("inspect")
@reported
def inspect_command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help=f"{_SOURCES} Or an image: prints the settings that generated it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON.")] = False,
) -> None:
    """Print shape, activation bits, size by part and theoretical cost of a packed file, or the settings of an image."""
    from robuq_core.hub import resolve_checkpoint
    from robuq_core.images import read_settings
    from robuq_core.inspection import Table, inspect_checkpoint, ratio, short_provenance

    if checkpoint is not None and checkpoint.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        typer.echo(json.dumps(read_settings(checkpoint), indent=2))
        return
    path = resolve_checkpoint(checkpoint)
    report = inspect_checkpoint(path)
    header = report.header
    if as_json:
        typer.echo(header.model_dump_json(indent=2))
        return
    for title, section in (("model", header.model), ("quantisation", header.quant), ("diffusion", header.diffusion),
                           ("sampler", header.sampler)):  # fmt: skip
        values = ", ".join(f"{key} {value}" for key, value in section.model_dump().items() if value != {})
        typer.echo(f"{title}: {values}")
    if header.class_names:
        typer.echo(f"classes: {len(header.class_names)}, from 0: {'; '.join(header.class_names[:3])} ...")
    typer.echo(f"decoder: {header.decoder}")
    typer.echo(f"average activation bits (MAC-weighted): {header.average_activation_bits:.3f}\n")
    typer.echo(report.bit_table().markdown)
    typer.echo(f"{path.name}: {report.file_bytes:,} bytes\n\n{report.size_table().markdown}")
    typer.echo(f"{report.compression:.1f} times smaller than FP32 ({report.fp32_bytes:,} bytes)\n")
    for title, parts, unit in (("GFLOPs per image and step, in full-precision equivalents", report.compute, 1e9),
                               ("theoretical MB", report.theoretical_bytes, 1e6)):  # fmt: skip
        rows = [(part, f"{cost.full / unit:.4f}", f"{cost.quantised / unit:.4f}") for part, cost in parts.items()]
        typer.echo(f"{title}\n\n{Table(('Part', 'FP32', 'Quantised'), rows).markdown}")
        typer.echo(f"{ratio(parts):.1f} times less, counted as in the paper (docs/method.md)\n")
    short = json.dumps(short_provenance(header.provenance), default=str)
    typer.echo(f"provenance (--json prints all of it): {short}")


@app.command()
@reported
@takes_params(PackingOptions)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Official .pt of DiT, SiT or REPA; diffusers folder; RUN_DIR/states/teacher; or old packed file."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(help="x.pt: official format; x.safetensors: packed; other: diffusers folder.")
    ],
    ptq: Annotated[bool, typer.Option("--ptq", help="Pack by rounding, without training: to try the runtime.")] = False,
    vae: Annotated[Path | None, typer.Option(help="AutoencoderKL folder to copy into a diffusers folder.")] = None,
    *,
    params: PackingOptions,
) -> None:
    """Convert DiT weights between formats, bit for bit; with --ptq, pack them.

    A packed file of an older format becomes one of the current format, with the same weights.
    """
    from robuq_core import convert as conversion

    old, packed = (path.suffix.lower() == conversion.PACKED_SUFFIX for path in (source, target))
    if ptq != packed and not (old and packed):
        raise UserError(f"{target}: only --ptq writes a packed file, whose name ends in {conversion.PACKED_SUFFIX}")
    options = given(params.model_dump())
    if ptq:
        _refuse(given({"vae": vae}), "only for a diffusers folder, without --ptq")
        _pack(source, target, params)
        return
    if old and packed:
        from robuq_core.checkpoint import renew_checkpoint

        _refuse(options | given({"vae": vae}), "not for a packed source")
        renew_checkpoint(source, target)
    else:
        _refuse(options.keys() - {"heads", "prediction", "classes", "flavour"}, "only for --ptq")
        conversion.convert_full_precision(source, target, vae=vae, **params.hints)
    typer.echo(f"wrote {target}")


def _pack(source: Path, target: Path, params: PackingOptions) -> None:
    from rich.progress import Progress

    from robuq_core.convert import pack_untrained, untrained_quant

    with Progress(transient=True) as progress:
        task = progress.add_task("quantising", total=None)
        result = pack_untrained(
            source,
            target,
            untrained_quant(**params.quant),
            sampler=SamplerConfig(**params.defaults),
            class_names=params.names,
            decoder=params.decoder_kind,
            on_layer=lambda name: progress.update(task, description=name, advance=1),
            **params.hints,
        )
    typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)")
    typer.secho(f"warning: {result.warning}", err=True, fg=typer.colors.YELLOW)


def _refuse(options: Iterable[str], reason: str) -> None:
    for name in options:
        raise UserError(f"--{name.replace('_', '-')} is {reason}; remove it")


@app.command("export-hub")
@reported
def export_hub_command(
    checkpoint: Annotated[Path, typer.Argument(help="Packed file, or a folder with one.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or a former export.")],
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Licence of the weights, by the hub's identifier; default: the file's."),
    ] = None,
) -> None:
    """Write a folder to upload to the Hugging Face hub: model card, config.json and the verified file."""
    from robuq_core.export_hub import export_hub
    from robuq_core.hub import resolve_checkpoint

    card = export_hub(resolve_checkpoint(checkpoint), folder, licence=licence)
    typer.echo(card)
    typer.echo(f"upload it with: hf upload OWNER/NAME {folder}", err=True)


if __name__ == "__main__":
    app()
