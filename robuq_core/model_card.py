"""The README.md of a checkpoint on the Hugging Face hub, written from the checkpoint's header."""

from __future__ import annotations

import json

from robuq_core.checkpoint import Header
from robuq_core.convert import METHOD
from robuq_core.hub import DECODER_FOLDER, LIBRARY_NAME
from robuq_core.inspection import Report, Table, short_provenance

_TAGS = ("image-generation", "diffusion", "diffusion-transformer", "quantized", "arxiv:2509.23582")
_TERNARY_TAGS = ("ternary", "1.58-bit")  # only with one plane: the sum of several has more levels


def model_card(report: Report, name: str, licence: str) -> str:
    """The card of the checkpoint file ``name`` in markdown, with front matter.

    Args:
        licence: of the weights, by the hub's identifier.
    """
    header = report.header
    title = name.removesuffix(".safetensors")
    bits = f"## Activation bits\n\n{_markdown(report.bit_table())}"
    parts = [_front_matter(header, licence), _introduction(report, title), *_untrained(header), _facts(report, name),
             bits, _usage(header, name), _provenance(header, licence)]  # fmt: skip
    return "\n".join(parts)


def _front_matter(header: Header, licence: str) -> str:
    tags = [
        *_TAGS,
        *(("class-conditional",) if header.model.num_classes else ()),
        *(_TERNARY_TAGS if header.quant.weight_planes == 1 else ()),
    ]
    pipeline = "unconditional-image-generation"
    tree = {"license": licence, "library_name": LIBRARY_NAME, "pipeline_tag": pipeline, "tags": tags}
    # A JSON value is a YAML value.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in tree.items()), "---", ""])


def _introduction(report: Report, title: str) -> str:
    header = report.header
    side, kind = header.model.input_size, "pixels" if header.decoder == "pixels" else "latent cells"
    planes = header.quant.weight_planes
    weights = "ternary weights" if planes == 1 else f"weights of {3**planes} levels ({planes} ternary planes)"
    count = header.model.num_classes
    model = "A class-conditional diffusion transformer" if count else "A diffusion transformer"
    classes = f"{count} classes" if count else "no classes"
    bits, megabytes = f"{header.average_activation_bits:.2f}", f"{report.file_bytes / 1e6:.2f} MB"
    return f"""# {title}

{model} with **{weights} and {bits}-bit activations** (MAC-weighted average),
packed for the RobuQ runtime: {classes}, samples of {side}x{side} {kind}, {megabytes},
{report.compression:.1f} times smaller than the same network in FP32. Method:
[RobuQ, arXiv 2509.23582](https://arxiv.org/abs/2509.23582).
"""


def _untrained(header: Header) -> list[str]:
    """The warning for weights that were only rounded, not trained to be quantised."""
    if header.provenance.get("method") != METHOD:
        return []
    error = header.provenance.get("relative_error_on_random_inputs")
    measured = (
        f"on random inputs its predictions are {error:.1%} (RMS) off those of the original"
        if isinstance(error, float) and error > 0
        else "the error of its predictions against the original could not be measured"
    )
    warning = f"""> **Not trained**: rounded from full-precision weights, without data (post-training quantisation);
> {measured}.
> What the method can do shows only after quantisation-aware training.
"""
    return [warning]


def _facts(report: Report, name: str) -> str:
    header = report.header
    model, quant, sampler = header.model, header.quant, header.sampler
    rows = [
        ("network", f"DiT: {model.depth} blocks of width {model.hidden_size}, {model.num_heads} heads, "
                    f"{model.num_tokens} tokens, patches of {model.patch_size}"),
        ("output", "pixels" if header.decoder == "pixels" else
                   f"latents of {model.in_channels} channels; needs the autoencoder it was trained with"),
        ("weights of the blocks", f"{quant.weight_planes} x ternary, scales by {quant.weight_scale}, "
                                  f"low-rank branch of rank {quant.rank}"),
        ("activations", f"{header.average_activation_bits:.2f} bits on average, {quant.adaln_bits} for adaLN, "
                        f"attention products {'full precision' if quant.attention_bits is None else '8 bits'}"),
        ("prediction", header.diffusion.prediction_type),
        ("default", f"{sampler.sampler}, {sampler.steps} steps, guidance {sampler.guidance_scale:g}"),
        ("file", f"`{name}`, {report.file_bytes:,} bytes; FP32 {report.fp32_bytes:,}"),
    ]  # fmt: skip
    return _markdown(Table(("", ""), rows)) + "\n" + _markdown(report.size_table())


def _markdown(table: Table) -> str:
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _usage(header: Header, name: str) -> str:
    latent = header.decoder == "latent"
    decoder = f', decoder="{DECODER_FOLDER}"' if latent else ""
    option = f" --decoder {DECODER_FOLDER}" if latent else ""
    note = (
        f"This is a latent model: `{DECODER_FOLDER}` is a diffusers folder of the autoencoder that it was trained\n"
        "with. It is found without the option if it has that name and lies in the checkpoint's folder.\n\n"
        if latent
        else ""
    )
    package, build_option = ("'.[vae]'", " --build-arg EXTRAS=vae") if latent else (".", "")
    environment = f" -e ROBUQ_DECODER=/model/{DECODER_FOLDER}" if latent else ""
    return f"""## Use

RobuQ is not on PyPI. In a checkout:

```sh
pip install {package}
docker build -t robuq-serve{build_option} .   # for containers
```

{note}```python
from robuq_core import Sampler

image = Sampler.from_checkpoint("{name}"{decoder}).generate(class_ids=[0], seed=0)[0]  # a PIL image
```

```python
import torch
from robuq_core import RobuQPipeline as DiTPipeline  # a script written for diffusers changes this line

pipe = DiTPipeline.from_pretrained("{name}"{decoder})
image = pipe(class_labels=[0], num_inference_steps=25, generator=torch.manual_seed(0)).images[0]
```

```sh
robuq sample 0 --checkpoint {name}{option}
robuq-serve --checkpoint {name}{option}
docker run -p 8000:8000 -v "$PWD:/model:ro" -e ROBUQ_CHECKPOINT=/model/{name}{environment} robuq-serve
```

`--checkpoint`, `from_checkpoint` and `from_pretrained` also take this repository's id instead of the file, if RobuQ
was installed with its extra `hub`.
"""


def _provenance(header: Header, licence: str) -> str:
    tree = json.dumps(short_provenance(header.provenance), indent=2, default=str)
    return f"""## Provenance

How the checkpoint was made, as recorded in it; complete in `config.json` and `robuq inspect --json`.

```json
{tree}
```

## Licence

Weights: `{licence}`. The runtime is Apache-2.0.
"""
