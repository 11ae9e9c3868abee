"""A checkpoint as a folder to upload to the Hugging Face hub: model card, ``config.json``, the file itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from robuq_core.checkpoint import Header, read_checkpoint
from robuq_core.convert import METHOD
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.hub import CONFIG_NAME, DECODER_FOLDER, LIBRARY_NAME, SUFFIX, exported_checkpoint, is_bare_name
from robuq_core.inspection import Report, Table, inspect_checkpoint, short_provenance

CARD_NAME = "README.md"
_TAGS = ["image-generation", "diffusion", "diffusion-transformer", "quantized", "arxiv:2509.23582"]

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Left by git and the hub's tools in an otherwise empty folder.
_EMPTY = {".git", ".gitattributes", ".cache", ".huggingface"}


class ExportError(UserError):
    """A folder that cannot be written; the message names the option or the folder, and the fix."""


def export_hub(checkpoint: Path, folder: Path, *, licence: str | None = None) -> Path:
    """Write ``folder`` with a verified copy of ``checkpoint``, ready for ``hf upload``; returns the card's path.

    A former export is replaced, file by file; other files in it stay. A checkpoint that cannot be used raises
    CheckpointError, a folder with other files ExportError.

    Args:
        licence: of the weights, by the hub's identifier; ``None``: ``license`` of the file's provenance.
    """
    header = read_checkpoint(checkpoint).header
    chosen = licence if licence is not None else header.provenance.get("license")
    if not isinstance(chosen, str) or not _LICENCE.fullmatch(chosen):
        raise ExportError(f"{chosen!r} is not a licence of the weights; give --license, such as apache-2.0, "
                          "cc-by-nc-4.0 or other (the identifiers of the Hugging Face hub)")  # fmt: skip
    name = checkpoint.stem + SUFFIX
    if not is_bare_name(name):
        raise ExportError(f"{checkpoint}: a name with wildcards or control characters cannot be downloaded; rename it")
    former = exported_checkpoint(folder / CONFIG_NAME)
    if former is None and folder.exists() and (folder.is_file() or {each.name for each in folder.iterdir()} - _EMPTY):
        raise ExportError(f"{folder}: not an empty folder, and not a former export; give another folder")
    about = {"library_name": LIBRARY_NAME, "checkpoint": name} | header.model_dump(mode="json", exclude={"tensors"})
    card = model_card(inspect_checkpoint(checkpoint), name, chosen)
    with replacing(folder / name) as part:
        shutil.copyfile(checkpoint, part)
        if read_checkpoint(part).header != header:
            raise ExportError(f"{checkpoint}: was changed while it was copied; export it again")
    for file, text in ((CONFIG_NAME, json.dumps(about, indent=2) + "\n"), (CARD_NAME, card)):
        with replacing(folder / file) as part:
            part.write_text(text, encoding="utf-8")
    if former is not None and former != name:
        (folder / former).unlink(missing_ok=True)
    return folder / CARD_NAME


def model_card(report: Report, name: str, licence: str) -> str:
    """The card of the checkpoint file ``name`` in markdown, with front matter.

    Args:
        licence: of the weights, by the hub's identifier.
    """
    header, model = report.header, report.header.model
    planes, latent = header.quant.weight_planes, header.decoder == "latent"
    # The sum of several ternary planes has more levels.
    weights = "ternary weights" if planes == 1 else f"weights of {3**planes} levels ({planes} ternary planes)"
    front = {
        "license": licence,
        "library_name": LIBRARY_NAME,
        "pipeline_tag": "unconditional-image-generation",
        "tags": _TAGS
        + (["class-conditional"] if model.num_classes else [])
        + (["ternary", "1.58-bit"] if planes == 1 else []),
    }
    # A JSON value is a YAML value.
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    provenance = json.dumps(short_provenance(header.provenance), indent=2, default=str)
    return f"""---
{front_matter}
---

# {name.removesuffix(".safetensors")}

A diffusion transformer with **{weights} and {header.average_activation_bits:.2f}-bit activations** (MAC-weighted
average), packed for the RobuQ runtime: {model.num_classes or "no"} classes, samples of \
{model.input_size}x{model.input_size} {"latent cells" if latent else "pixels"}, {report.file_bytes / 1e6:.2f} MB,
{report.compression:.1f} times smaller than the same network in FP32. Method:
[RobuQ, arXiv 2509.23582](https://arxiv.org/abs/2509.23582).

{_untrained(header)}{Table(("", ""), _facts(report, name)).markdown}
{report.size_table().markdown}
## Activation bits

{report.bit_table().markdown}
{_usage(name, latent)}
## Provenance

How the checkpoint was made, as recorded in it; complete in `config.json` and `robuq inspect --json`.

```json
{provenance}
```

## Licence

Weights: `{licence}`. The runtime is Apache-2.0.
"""


def _untrained(header: Header) -> str:
    """The warning for weights that were only rounded, not trained to be quantised."""
    if header.provenance.get("method") != METHOD:
        return ""
    error = header.provenance.get("relative_error_on_random_inputs")
    measured = (
        f"on random inputs its predictions are {error:.1%} (RMS) off those of the original"
        if isinstance(error, float) and error > 0
        else "the error of its predictions against the original could not be measured"
    )
    return f"""> **Not trained**: rounded from full-precision weights, without data (post-training quantisation);
> {measured}.
> What the method can do shows only after quantisation-aware training.

"""


def _facts(report: Report, name: str) -> list[tuple[str, str]]:
    header = report.header
    model, quant, sampler = header.model, header.quant, header.sampler
    latents = f"latents of {model.in_channels} channels; needs the autoencoder it was trained with"
    return [
        ("network", f"DiT: {model.depth} blocks of width {model.hidden_size}, {model.num_heads} heads, "
                    f"{model.num_tokens} tokens, patches of {model.patch_size}"),
        ("output", latents if header.decoder == "latent" else "pixels"),
        ("weights of the blocks", f"{quant.weight_planes} x ternary, low-rank branch of rank {quant.rank}"),
        ("activations", f"{header.average_activation_bits:.2f} bits on average, {quant.adaln_bits} for adaLN, "
                        f"attention products {'full precision' if quant.attention_bits is None else '8 bits'}"),
        ("prediction", header.diffusion.prediction_type),
        ("default", f"{sampler.sampler}, {sampler.steps} steps, guidance {sampler.guidance_scale:g}"),
        ("file", f"`{name}`, {report.file_bytes:,} bytes; FP32 {report.fp32_bytes:,}"),
    ]  # fmt: skip


def _usage(name: str, latent: bool) -> str:
    extra = ".[vae]" if latent else "."
    note = f"""
This is a latent model: put a diffusers folder of the autoencoder that it was trained with next to the file as
`{DECODER_FOLDER}`, or name it (`--decoder`, `decoder=`, `ROBUQ_DECODER`).
"""
    return f"""## Use

RobuQ is not on PyPI: `pip install '{extra}'` in a checkout.
{note if latent else ""}
```python
from robuq_core import Sampler

image = Sampler.from_checkpoint("{name}").generate(class_ids=[0], seed=0)[0]  # a PIL image
```

```python
import torch
from robuq_core import RobuQPipeline as DiTPipeline  # a script written for diffusers changes this line

pipe = DiTPipeline.from_pretrained("{name}")
image = pipe(class_labels=[0], num_inference_steps=25, generator=torch.manual_seed(0)).images[0]
```

```sh
robuq sample 0 --checkpoint {name}
robuq-serve --checkpoint {name}
docker run -p 8000:8000 -v "$PWD:/model:ro" -e ROBUQ_CHECKPOINT=/model/{name} robuq-serve
```

All of them also take this repository's id instead of the file, if RobuQ was installed with its extra `hub`.
"""
