"""``robuq``: draw from, look into and time a packed checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from robuq_core.bench.cli import app as bench_app
from robuq_core.classes import read_names
from robuq_core.cli_support import (
    ActivationBitsOption,
    ClassesOption,
    DecoderKindOption,
    FlavourOption,
    HeadsOption,
    PlanesOption,
    PredictionOption,
    RankOption,
    SamplerOption,
    ScaleOption,
    StepsOption,
    given,
    reported,
    takes_params,
)
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

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="Packed file, a folder that holds one, a bundled one's name, or a hub id; default: imagenet (bundled).",
    ),
]
DecoderOption = Annotated[
    Path | None, typer.Option(help="Diffusers folder of a latent model's autoencoder; default: vae beside the file.")
]
BackendOption = Annotated[
    str, typer.Option(help="Kernel backend: auto, cpu (native), triton (NVIDIA GPU) or reference (torch).")
]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cuda:0; default: the backend's choice.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")]


@app.command()
@reported
@takes_params("class_id", "class_name")
def sample(
    class_ids: Annotated[
        list[str] | None, typer.Argument(help="One image a class, by id or name, e.g. 207 goldfish; 0 if it has none.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path("samples"),
    checkpoint: CheckpointOption = None,
    decoder: DecoderOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    embed_settings: Annotated[
        bool, typer.Option(help="Store checkpoint, class, seed and all settings in each file, for robuq inspect.")
    ] = True,
    *,
    params: ImageParams,
) -> None:
    """Generate one image for each class into PNG files; what is not given takes the checkpoint's default."""
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
    if loaded.timings is not None:
        spent = loaded.timings
        typer.echo(
            f"{len(images)} images: {spent.sampling_s:.3f} s of steps, {spent.decode_s:.3f} s of decoding", err=True
        )


@app.command()
@reported
@takes_params("class_id", "class_name", "num_images")
def compare(
    images: Annotated[int, typer.Option(min=1, help="How many; image i draws class i with seed i.")] = 16,
    checkpoint: CheckpointOption = None,
    decoder: DecoderOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    *,
    params: ImageParams,
) -> None:
    """Print what guidance at some timesteps alone or step caching saves, and how far its pictures then are off."""
    from robuq_core.compare import compare_short_cuts
    from robuq_core.pipeline import Sampler

    loaded = Sampler.from_checkpoint(checkpoint, decoder=decoder, backend=backend, threads=threads, device=device)
    classes = [i % loaded.drawn_classes for i in range(images)]
    result = compare_short_cuts(loaded, classes, **params.given)
    typer.echo(
        f"{result.images} images: {result.rows} of {result.rows_full} rows through the blocks, "
        f"{result.seconds:.2f} of {result.seconds_full:.2f} s, PSNR {result.psnr_db:.1f} dB; "
        f"as much work in {result.fewer_steps} plain steps: {result.fewer_steps_psnr_db:.1f} dB"
    )


@app.command("inspect")
@reported
def inspect_command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Packed file, a folder that holds one, a bundled one's name, or a hub id; default: imagenet (bundled)."
            " Or an image: prints the settings that it was generated with."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON.")] = False,
) -> None:
    """Print the shape, the bit table and the size by part of a packed file, and its size and compute in theory."""
    from rich.console import Console
    from rich.table import Table

    from robuq_core.hub import resolve_checkpoint
    from robuq_core.images import read_settings
    from robuq_core.inspection import inspect_checkpoint, ratio

    if checkpoint is not None and checkpoint.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        typer.echo(json.dumps(read_settings(checkpoint), indent=2))
        return
    path = resolve_checkpoint(checkpoint)
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
    for title, parts, unit in (("GFLOPs of an image and step, in full-precision ones", report.compute, 1e9),
                               ("theoretical MB", report.theoretical_bytes, 1e6)):  # fmt: skip
        table = Table("part", "FP32", "quantised", title=title)
        for part, amount in parts.items():
            table.add_row(part, f"{amount.full / unit:.4f}", f"{amount.quantised / unit:.4f}")
        console.print(table)
        console.print(f"{ratio(parts):.1f} times less, counted as in the paper (docs/method.md)")
    console.print(f"[bold]provenance[/bold]: {json.dumps(header.provenance, default=str)}")


@app.command()
@reported
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Official .pt of DiT, SiT or REPA; diffusers folder; RUN_DIR/states/teacher; or old packed file."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="x.pt: official; x.safetensors: packed; else: diffusers.")],
    ptq: Annotated[bool, typer.Option("--ptq", help="Quantise without training: to try the runtime.")] = False,
    weight_planes: PlanesOption = None,
    activation_bits: ActivationBitsOption = None,
    rank: RankOption = None,
    heads: HeadsOption = None,
    prediction: PredictionOption = None,
    classes: ClassesOption = None,
    flavour: FlavourOption = None,
    decoder_kind: DecoderKindOption = None,
    steps: StepsOption = None,
    guidance_scale: ScaleOption = None,
    sampler: SamplerOption = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file for --ptq, one name a line.")] = None,
    vae: Annotated[Path | None, typer.Option(help="AutoencoderKL folder to copy into a diffusers folder.")] = None,
) -> None:
    """Take DiT weights from one form to another; full precision is kept bit for bit, unless --ptq packs it.

    A packed file of an older format becomes one of the present format, with the same weights.
    """
    from robuq_core import convert as conversion

    renews, packs = (path.suffix.lower() == conversion.PACKED_SUFFIX for path in (source, target))
    if ptq != packs and not (renews and packs):
        raise UserError(f"{target}: a packed file ends in {conversion.PACKED_SUFFIX} and is made with --ptq, "
                        "and only with it")  # fmt: skip
    quant = {"weight_planes": weight_planes, "activation_bits": activation_bits, "rank": rank}
    defaults = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    if ptq:
        _refuse({"vae": vae}, "a diffusers folder, which is made without --ptq")
    else:
        others = {"decoder_kind": decoder_kind, "class_names": class_names}
        _refuse({**quant, **defaults, **others}, "--ptq")
        if renews and packs:
            from robuq_core.checkpoint import renew_checkpoint

            said = {"heads": heads, "prediction": prediction, "classes": classes, "flavour": flavour, "vae": vae}
            _refuse(said, "other conversions than that of a packed file")
            renewed = renew_checkpoint(source, target)
            typer.echo(f"wrote {target} (format_version {renewed.format_version})")
            return
        conversion.convert_full_precision(
            source, target, num_heads=heads, prediction=prediction, num_classes=classes, flavour=flavour, vae=vae
        )
        typer.echo(f"wrote {target}")
        return
    from rich.progress import Progress

    names = () if class_names is None else read_names(class_names)
    with Progress(transient=True) as progress:
        task = progress.add_task("quantising", total=None)
        result = conversion.pack_untrained(
            source,
            target,
            conversion.untrained_quant(**given(quant)),
            sampler=SamplerConfig.model_validate(given(defaults)),
            class_names=names,
            num_heads=heads,
            prediction=prediction,
            num_classes=classes,
            flavour=flavour,
            decoder=decoder_kind,
            on_layer=lambda name: progress.update(task, description=name, advance=1),
        )
    typer.echo(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)")
    typer.secho(f"warning: {result.warning}", err=True, fg=typer.colors.YELLOW)


def _refuse(options: Mapping[str, Any], owner: str) -> None:
    for name in given(options):
        raise UserError(f"--{name.replace('_', '-')} belongs to {owner}; leave it out")


@app.command("export-hub")
@reported
def export_hub_command(
    checkpoint: Annotated[Path, typer.Argument(help="Packed file, or a folder that holds one.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; new, empty, or a former export.")],
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Of the weights, such as cc-by-nc-4.0 (the hub's identifiers); default: the file's."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder with other things in it too.")] = False,
) -> None:
    """Write a folder to upload to the Hugging Face hub: model card, config.json and the verified file."""
    from robuq_core.export_hub import export_hub
    from robuq_core.hub import resolve_checkpoint

    card = export_hub(resolve_checkpoint(checkpoint), folder, licence=licence, force=force)
    typer.echo(card)
    typer.echo(f"upload it with: hf upload OWNER/NAME {folder}", err=True)


if __name__ == "__main__":
    app()
