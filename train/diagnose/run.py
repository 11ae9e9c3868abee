"""Run a model on fixed inputs and listen to every quantised layer and every head.

By hooks on a plain or fake-quantised model, through the reference backend on a packed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import Checkpoint, read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.decode import load_decoder
from robuq_core.kernels.ops import Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import LAYERS, PackedDiT
from robuq_core.models.quant_linear import QuantLinear, layer_bits, layer_rotation_block, quantizable_linears
from robuq_core.pipeline import Denoiser, Sampler
from robuq_core.quant.hadamard import Rotation, random_signs
from robuq_core.quant.packing import unpack_planar
from robuq_core.quant.ternary import ternary_fake_quantize
from train.diagnose.watch import Diagnosis, LayerInput, LayerWatch
from train.evaluation.networks import EvaluationError
from train.evaluation.samples import Which, default_model, model_path, plain_sampler, random_classes
from train.logs import tracked
from train.parallel import training_device
from train.run import Run

Observe = Callable[[str, Tensor], None]


def layer_inputs(model: DiT, quant: QuantConfig) -> dict[str, LayerInput]:
    """Of every block linear, by name. Of a model in full precision: what ``quant`` would make of it."""
    found = {}
    generator = torch.Generator().manual_seed(quant.seed)
    for name, linear in quantizable_linears(model):
        if isinstance(linear, QuantLinear):
            width = linear.rotation.width
            weights = partial(_student_weights, linear)
            found[name] = LayerInput(width, linear.rotation, linear.bits, linear.grid, linear.activation, weights)
        elif isinstance(linear, nn.Linear):
            width = linear.in_features
            block = layer_rotation_block(name, quant)
            rotation = Rotation(width, random_signs(width, generator), block).to(linear.weight.device)
            weights = partial(_teacher_weights, linear, rotation)
            found[name] = LayerInput(width, rotation, layer_bits(name, quant), quant.grid, quant.activation, weights)
    return found


@torch.no_grad()
def _teacher_weights(linear: nn.Linear, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Without the low-rank branch that quantisation would split off."""
    weight = rotation(linear.weight)
    return weight, weight


@torch.no_grad()
def _student_weights(linear: QuantLinear) -> tuple[Tensor, Tensor]:
    ternary = ternary_fake_quantize(linear.weight, linear.weight_scale, linear.weight_planes)
    return ternary, ternary + linear.lowrank_a @ linear.lowrank_b


def _packed_weights(layer: TernaryLayer) -> tuple[Tensor, Tensor]:
    ternary = torch.zeros(layer.out_features, layer.in_features)
    for plane in (layer, *layer.extra_planes):
        ternary += unpack_planar(plane.planar, layer.in_features).float() * plane.alpha[:, None]
    return ternary, ternary + layer.lowrank_a @ layer.lowrank_b


@contextmanager
def observed(model: DiT, observe: Observe, observe_qkv: Observe | None = None) -> Iterator[None]:
    """While it lasts, every forward of ``model`` calls ``observe(layer, tokens [M, K])`` for each block linear, and
    ``observe_qkv(layer, qkv [B, L, 3 D])`` with what each qkv gives."""

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        observe(name, inputs[0].flatten(0, -2))

    def keep_qkv(name: str, module: nn.Module, inputs: tuple[Any, ...], qkv: Tensor) -> None:
        if observe_qkv is not None:
            observe_qkv(name, qkv)

    handles = [linear.register_forward_pre_hook(partial(keep, name)) for name, linear in quantizable_linears(model)]
    for name, linear in quantizable_linears(model):
        if name.endswith(".qkv"):
            handles.append(linear.register_forward_hook(partial(keep_qkv, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ObservedBackend(ReferenceBackend):
    """The reference backend; calls ``observe(layer, tokens [M, K])`` with what each layer is about to rotate, and
    ``observe_qkv(layer, qkv [B, L, 3 D])`` with what each attention is about to take."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.names: dict[int, str] = {}
        self.observe: Observe = lambda name, tokens: None
        self.observe_qkv: Observe = lambda name, qkv: None
        self._latest = ""

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        self._latest = self.names[id(layer)]
        self.observe(self._latest, apply_prologue(x, prologue))
        return super().rotate_quantize(x, layer, prologue)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        self.observe_qkv(self._latest, qkv)
        return super().attention(qkv, num_heads, quantized)


def observed_packed(checkpoint: Checkpoint) -> tuple[PackedDiT, ObservedBackend, dict[str, LayerInput]]:
    """A packed model on a backend that can be listened to, and how its layers treat their inputs."""
    header, backend = checkpoint.header, ObservedBackend()
    is_quantized = header.quant.attention_bits is not None
    model = PackedDiT(header.model, checkpoint.dense, checkpoint.layers, backend, is_quantized)
    inputs = {}
    for i, block in enumerate(model.blocks):
        for part, layer in zip(LAYERS, block.layers, strict=True):
            name = f"blocks.{i}.{part}"
            backend.names[id(layer)] = name
            rotation = Rotation(layer.in_features, layer.signs, layer.rotation_block)
            weights = partial(_packed_weights, layer)
            inputs[name] = LayerInput(layer.in_features, rotation, layer.bits, layer.grid, "gaussian", weights)
    return model, backend, inputs


_DRAWN = 8  # images that are generated to see activations where there are no photos


def diagnose_run(run: Run, which: Which | None = None, checkpoint: Path | None = None) -> Diagnosis:
    """Run one model and look at what its layers are given.

    The inputs are the fixed set of ``sensitivity``: noised photos at all timesteps. Where ``data.path`` does not exist,
    they are the states of images that the model generates.

    Args:
        which: the model of the run; none is the last that it has made. ``checkpoint``: a packed file instead.

    Raises:
        StateError, CheckpointError, DataError: the model or the data cannot be read. EvaluationError: nothing to see.
    """
    chosen = which or default_model(run)
    name = chosen if checkpoint is None else checkpoint.stem
    if checkpoint is not None or chosen == "packed":
        return _diagnose_packed(run, checkpoint or model_path(run, "packed"), name)
    config, device = run.config, training_device()
    model = (run.teacher() if chosen == "teacher" else run.student()).eval().to(device)
    quant = run.quant if chosen == "student" else config.quant
    watch = LayerWatch(layer_inputs(model, quant), config.model.num_heads, config.seed)
    with torch.no_grad(), observed(model, watch, watch.attention):
        return watch.result(name, _watch(run, model, device, lambda: plain_sampler(model, config, name)))


def _diagnose_packed(run: Run, path: Path, name: str) -> Diagnosis:
    """Of a packed file, run by the reference backend."""
    config, checkpoint = run.config, read_checkpoint(path)
    header = checkpoint.header
    if header.model != config.model:
        raise EvaluationError(f"{path}: not of the configured model; give the configuration it was trained with")
    model, backend, inputs = observed_packed(checkpoint)
    backend.observe = watch = LayerWatch(inputs, header.model.num_heads, config.seed)
    backend.observe_qkv = watch.attention

    def sampler() -> Sampler:
        decoder = None if config.data.vae is None else load_decoder(config.data.vae)
        size = model.weight_bytes
        return Sampler(
            model, header, checkpoint_name=name, backend_name=backend.name, weight_bytes=size, decoder=decoder
        )

    return watch.result(name, _watch(run, model, backend.device, sampler))


def _watch(run: Run, model: Denoiser, device: torch.device, sampler: Callable[[], Sampler]) -> str:
    """Let ``model`` see its inputs; says which."""
    config = run.config
    if not config.data.path.exists():
        own = sampler()
        own.generate(random_classes(_DRAWN, own.valid_classes, config.seed), config.seed)
        count, defaults = min(_DRAWN, own.valid_classes), own.defaults
        return f"{count} images generated by the model itself, at all {defaults.steps} steps of {defaults.sampler}"
    samples, size = config.sensitivity.samples, config.sensitivity.batch_size
    with tracked(run.fixed_points(samples, size, config.seed), "watching layers") as batches:
        for batch in batches:
            model.forward(batch.x_t.to(device), batch.timesteps, batch.classes)
    return f"{samples} noised training images, timesteps spread evenly over 0..999"
