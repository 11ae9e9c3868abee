"""DiT weights from one form to another: the authors' ``.pt``, a diffusers folder, a packed file.

A packed file comes from full-precision weights by post-training quantisation: rotation, low rank by SVD and ternary
planes, layer after layer, without data or training (:mod:`train.ptq` calibrates them). What that costs is measured and
written into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core import __version__
from robuq_core.checkpoint import (
    CheckpointError,
    Description,
    Header,
    decoder_kind,
    dense_shapes,
    layer_shapes,
    write_packed,
)
from robuq_core.config import (
    NUM_TRAIN_TIMESTEPS,
    DecoderKind,
    DiffusionConfig,
    Flavour,
    PredictionType,
    QuantConfig,
    SamplerConfig,
    fitting_defaults,
)
from robuq_core.freed_memory import give_freed_memory_back
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend, TernaryLayer
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.models.adapters import Weights, read_weights, save_diffusers, save_official
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import LinearQuantizer, check_bits

METHOD = "post-training quantisation, not trained"
OFFICIAL_SUFFIXES = (".pt", ".pth")
PACKED_SUFFIX = ".safetensors"
# Asked for by these names is a file, not a folder.
_OTHER_SUFFIXES = (PACKED_SUFFIX, ".bin", ".ckpt", ".tar", ".pkl")
_PROBE_IMAGES = 4
# Above this, samples of an untrained network have been seen to fall apart.
_UNUSABLE_ERROR = 0.25

Progress = Callable[[str], None]
# Packed block linears of weights as a configuration says, and what the provenance says of how; ``SamplerConfig``: the
# defaults of the file.
Quantize = Callable[
    [Weights, QuantConfig, SamplerConfig, Progress | None], tuple[dict[str, TernaryLayer], dict[str, Any]]
]


@dataclass(frozen=True)
class PackedResult:
    """``relative_error``: RMS of (packed - original) over RMS of the original's prediction, on random inputs.

    None if the original predicts nothing but zeros there.
    """

    header: Header
    relative_error: float | None

    @property
    def warning(self) -> str:
        """What a user must know before they judge the pictures."""
        return (
            f"quantised without training: {self._verdict}. "
            "What ternary weights can do shows only after robuq-train qat."
        )

    @property
    def _verdict(self) -> str:
        if self.relative_error is None:
            return "the original predicts nothing but zeros, as before training, so nothing could be compared"
        pictures = (
            "expect noise rather than pictures; take more --weight-planes or activation bits, or train"
            if self.relative_error > _UNUSABLE_ERROR
            else "pictures will differ from the original's, most of all with many steps and strong guidance"
        )
        return f"on random inputs the packed network is {self.relative_error:.1%} (RMS) off the original: {pictures}"


def untrained_quant(weight_planes: int = 3, activation_bits: int = 8, rank: int = 16) -> QuantConfig:
    """The default of :func:`pack_untrained`. adaLN's inputs have 8 bits too: they cost next to nothing."""
    return QuantConfig(activation_bits=activation_bits, adaln_bits=8, weight_planes=weight_planes, rank=rank)


def convert_full_precision(
    source: Path,
    target: Path,
    *,
    num_heads: int | None = None,
    prediction: PredictionType | None = None,
    num_classes: int | None = None,
    flavour: Flavour | None = None,
    vae: Path | None = None,
) -> Weights:
    """Write the weights of ``source`` as an official ``.pt``, or as a diffusers folder if ``target`` is not called so.

    Raises:
        WeightsError: ``target`` is called as a file of another kind, or as
            :func:`robuq_core.models.adapters.read_weights` and the writers.
    """
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise WeightsError(f"{target}: full precision is written as {' or '.join(OFFICIAL_SUFFIXES)}, or as a folder "
                           f"of diffusers, which is not to be called {target.suffix}")  # fmt: skip
    weights = read_weights(source, num_heads, prediction=prediction, num_classes=num_classes, flavour=flavour)
    model = weights.model(mapped=True)
    if target.suffix.lower() in OFFICIAL_SUFFIXES:
        if vae is not None:
            raise WeightsError(f"{target}: an official .pt holds no decoder; leave out vae (--vae)")
        save_official(model, target, weights.diffusion)
    else:
        save_diffusers(model, target, diffusion=weights.diffusion, class_names=weights.class_names, vae=vae)
    return weights


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
    num_heads: int | None = None,
    prediction: PredictionType | None = None,
    num_classes: int | None = None,
    flavour: Flavour | None = None,
    decoder: DecoderKind | None = None,
    on_layer: Progress | None = None,
    quantize: Quantize = _untrained,
) -> PackedResult:
    """Quantise the full-precision weights of ``source`` without training and pack them into ``target``.

    Memory holds the packed network and one full-precision layer at a time; the source is mapped.

    Args:
        quant: how; see :func:`untrained_quant`.
        sampler: defaults of requests; a field that is not set in it takes what fits the network.
        class_names: ``()`` keeps those of the source, if it has any.
        num_heads, prediction, num_classes: as :func:`robuq_core.models.adapters.read_weights` takes them.
        flavour: whose numerics to run with; default: those of the source's layout.
        decoder: what the network draws; default: by its channels, as :func:`robuq_core.checkpoint.decoder_kind` says.
        on_layer: called with each layer's name when it is done.
        quantize: makes the layers; default: :func:`quantize_layers`.

    Raises:
        WeightsError, CheckpointError: the source cannot be used, or does not fit the packed form.
        ValueError: a width without a Hadamard matrix, or a rank that leaves nothing to quantise.
    """
    weights = read_weights(source, num_heads, prediction=prediction, num_classes=num_classes, flavour=flavour)
    diffusion = weights.diffusion or DiffusionConfig()
    try:
        defaults = fitting_defaults(sampler or SamplerConfig(), weights.config, diffusion.prediction_type)
    except ValueError as unfit:
        raise CheckpointError(f"{source}: {unfit}") from unfit
    names = class_names or weights.class_names
    if names and len(names) != weights.config.num_classes:
        raise CheckpointError(f"{len(names)} class names for {weights.config.num_classes} classes")
    draws = decoder_kind(weights.config, decoder)
    layers, made = quantize(weights, quant, defaults, on_layer)
    dense = {name: weights.tensor(name) for name in dense_shapes(weights.config)}
    error = relative_error(weights, quant, dense, layers, select_backend())
    give_freed_memory_back()
    about = Description(quant, diffusion, defaults, names, _provenance(weights, error, made), draws)
    return PackedResult(write_packed(target, weights.config, dense, layers, about), error)


def quantize_layers(weights: Weights, quant: QuantConfig, on_layer: Progress | None = None) -> dict[str, TernaryLayer]:
    """The packed block linears of ``weights``: what packing a model fresh from ``quantize_model`` gives.

    Raises:
        WeightsError: as :meth:`Weights.tensor`.
        ValueError: as :func:`pack_untrained`, or ``quant.bits`` names layers that the model lacks.
    """
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
    weights: Weights,
    quant: QuantConfig,
    dense: Mapping[str, Tensor],
    layers: dict[str, TernaryLayer],
    backend: Backend,
) -> float | None:
    """``|packed - original| / |original|`` of the prediction, for noise at timesteps and classes across their range.

    None if the original predicts nothing but zeros, as an untrained one does.
    """
    config = weights.config
    stored = {name: tensor.half().float() for name, tensor in dense.items()}
    packed = PackedDiT(config, stored, layers, backend, quant.attention_bits is not None)
    size, fractions = config.input_size, (torch.arange(_PROBE_IMAGES) + 0.5) / _PROBE_IMAGES
    x = torch.randn(_PROBE_IMAGES, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    timesteps, classes = (fractions * NUM_TRAIN_TIMESTEPS).long(), (fractions * config.drawn_classes).long()
    original = weights.model(mapped=True)(x, timesteps, classes)[:, : config.in_channels]
    output = packed.forward(x.to(backend.device), timesteps, classes).cpu()[:, : config.in_channels]
    size_of_original = float(original.norm())
    return float((output - original).norm()) / size_of_original if size_of_original else None


def _provenance(weights: Weights, error: float | None, made: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **made,
        "source": {"name": weights.path.name, "layout": weights.layout},
        "relative_error_on_random_inputs": error,
        "versions": {"robuq": __version__, "torch": str(torch.__version__)},
    }
