"""DiT weights from one format to another: the authors' ``.pt``, a diffusers folder, a packed file.

Packing full-precision weights is post-training quantisation: rotation, low rank by SVD and ternary planes, layer by
layer, without data or training (:mod:`train.ptq` calibrates them). The error is measured and stored in the file.
Weights that cannot be read, written or packed raise WeightsError or CheckpointError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from robuq_core import __version__
from robuq_core.checkpoint import (
    CheckpointError,
    Description,
    Header,
    give_freed_memory_back,
    new_header,
    write_packed,
)
from robuq_core.config import (
    NUM_TRAIN_TIMESTEPS,
    DecoderKind,
    DiffusionConfig,
    QuantConfig,
    SamplerConfig,
    fitting_defaults,
)
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend, TernaryLayer
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.models.adapters import Weights, read_weights, save_diffusers, save_official
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.adapters_official import Hints
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import LinearQuantizer, check_bits
from robuq_core.models.shapes import dense_shapes, layer_shapes

METHOD = "post-training quantisation, not trained"
OFFICIAL_SUFFIXES = (".pt", ".pth")
PACKED_SUFFIX = ".safetensors"
# Targets with these suffixes are meant as files, not folders.
_OTHER_SUFFIXES = (PACKED_SUFFIX, ".bin", ".ckpt", ".tar", ".pkl")
_PROBE_IMAGES = 4
# Above this, images of an untrained network have been seen to fall apart.
_UNUSABLE_ERROR = 0.25

Progress = Callable[[str], None]
# Packed block linears, and how they were made for the provenance. ``SamplerConfig``: the defaults of the file.
Quantize = Callable[
    [Weights, QuantConfig, SamplerConfig, Progress | None], tuple[dict[str, TernaryLayer], dict[str, Any]]
]


@dataclass(frozen=True)
class PackedResult:
    """``relative_error``: RMS of (packed - original) over RMS of the original's prediction, on random inputs; None if
    the original predicts only zeros there."""

    header: Header
    relative_error: float | None

    @property
    def warning(self) -> str:
        """What a user must know before judging the images."""
        error = self.relative_error
        if error is None:
            found = "the original predicts only zeros, as before training, so nothing could be compared"
        else:
            found = f"on random inputs the packed network is {error:.1%} (RMS) off the original: " + (
                "expect noise instead of images; use more --weight-planes or activation bits, or train"
                if error > _UNUSABLE_ERROR
                else "images will differ from the original's, most with many steps and strong guidance"
            )
        return f"quantised without training: {found}. What ternary weights can do shows only after robuq-train qat."


def untrained_quant(weight_planes: int = 3, activation_bits: int = 8, rank: int = 16) -> QuantConfig:
    """The default for :func:`pack_untrained`. adaLN's inputs have 8 bits too, at little cost."""
    return QuantConfig(activation_bits=activation_bits, adaln_bits=8, weight_planes=weight_planes, rank=rank)


def convert_full_precision(source: Path, target: Path, *, vae: Path | None = None, **hints: Unpack[Hints]) -> None:
    """Write the weights of ``source`` as an official ``.pt``, or as a diffusers folder if ``target`` has no suffix.

    Args:
        vae, hints: see :func:`robuq_core.models.adapters.save_diffusers` and ``read_weights``.
    """
    suffix = target.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise WeightsError(f"{target}: full precision is written as {' or '.join(OFFICIAL_SUFFIXES)}, or as a "
                           f"diffusers folder, whose name cannot end in {target.suffix}")  # fmt: skip
    if suffix in OFFICIAL_SUFFIXES and vae is not None:
        raise WeightsError(f"{target}: an official .pt contains no decoder; remove vae (--vae)")
    weights = read_weights(source, **hints)
    model = weights.model(mapped=True)
    if suffix in OFFICIAL_SUFFIXES:
        save_official(model, target, weights.diffusion)
    else:
        save_diffusers(model, target, diffusion=weights.diffusion, class_names=weights.class_names, vae=vae)


def _untrained(
    weights: Weights, quant: QuantConfig, defaults: SamplerConfig, on_layer: Progress | None
) -> tuple[dict[str, TernaryLayer], dict[str, Any]]:
    return quantize_layers(weights, quant, on_layer), {"method": METHOD}


def pack_untrained(
    source: Path,
    target: Path,
    quant: QuantConfig,
    *,
    sampler: SamplerConfig | None = None,
    class_names: tuple[str, ...] = (),
    decoder: DecoderKind | None = None,
    on_layer: Progress | None = None,
    quantize: Quantize = _untrained,
    **hints: Unpack[Hints],
) -> PackedResult:
    """Quantise the full-precision weights of ``source`` without training and pack them into ``target``.

    Memory holds the packed network and one full-precision layer at a time; the source is memory-mapped.

    Args:
        quant: see :func:`untrained_quant`.
        sampler: defaults of requests; fields that are not set are chosen to fit the network.
        class_names: ``()`` keeps those of the source.
        decoder: default: see :func:`robuq_core.checkpoint.decoder_kind`.
        on_layer: called with each layer's name when it is done.
        quantize: makes the layers; default: :func:`quantize_layers`.
        hints: see :class:`robuq_core.models.adapters_official.Hints`.
    """
    weights = read_weights(source, **hints)
    diffusion = weights.diffusion or DiffusionConfig()
    try:
        defaults = fitting_defaults(sampler or SamplerConfig(), weights.config, diffusion.prediction_type)
    except ValueError as unfit:
        raise CheckpointError(f"{source}: {unfit}") from unfit
    about = Description(quant, diffusion, defaults, class_names or weights.class_names, decoder=decoder)
    new_header(weights.config, about)  # refuses what cannot be packed before the work
    layers, made = quantize(weights, quant, defaults, on_layer)
    dense = {name: weights.tensor(name) for name in dense_shapes(weights.config)}
    error = relative_error(weights, quant, dense, layers, select_backend())
    give_freed_memory_back()
    provenance = {
        **made,
        "source": {"name": weights.path.name, "layout": weights.layout},
        "relative_error_on_random_inputs": error,
        "versions": {"robuq": __version__, "torch": str(torch.__version__)},
    }
    header = write_packed(target, weights.config, dense, layers, replace(about, provenance=provenance))
    return PackedResult(header, error)


def quantize_layers(weights: Weights, quant: QuantConfig, on_layer: Progress | None = None) -> dict[str, TernaryLayer]:
    """The packed block linears of ``weights``, as packing the result of ``quantize_model`` would give."""
    shapes = layer_shapes(weights.config)
    check_bits(quant, shapes)
    quantize = LinearQuantizer(quant)
    layers = {}
    for name, (out, into) in shapes.items():
        linear = nn.Linear(into, out, device="meta")
        linear.weight = nn.Parameter(weights.tensor(f"{name}.weight"), requires_grad=False)
        linear.bias = nn.Parameter(weights.tensor(f"{name}.bias"), requires_grad=False)
        layers[name] = pack_layer(quantize(name, linear))
        give_freed_memory_back()
        if on_layer is not None:
            on_layer(name)
    return layers


@torch.inference_mode()
def relative_error(
    weights: Weights, quant: QuantConfig, dense: Mapping[str, Tensor], layers: dict[str, TernaryLayer], backend: Backend
) -> float | None:
    """``|packed - original| / |original|`` of the prediction, for noise at timesteps and classes across their range;
    None if the original predicts only zeros, as an untrained one does."""
    config = weights.config
    stored = {name: tensor.half().float() for name, tensor in dense.items()}
    packed = PackedDiT(config, stored, layers, backend, quant.attention_bits is not None)
    size, fractions = config.input_size, (torch.arange(_PROBE_IMAGES) + 0.5) / _PROBE_IMAGES
    x = torch.randn(_PROBE_IMAGES, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    timesteps, classes = (fractions * NUM_TRAIN_TIMESTEPS).long(), (fractions * config.valid_classes).long()
    original = weights.model(mapped=True)(x, timesteps, classes)[:, : config.in_channels]
    output = packed.forward(x.to(backend.device), timesteps.tolist(), classes.tolist()).cpu()[:, : config.in_channels]
    norm = float(original.norm())
    return float((output - original).norm()) / norm if norm else None
