"""Run a model on fixed inputs and listen to every quantised layer and every head.

By hooks on a plain or fake-quantised model, through the reference backend on a packed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import Checkpoint, read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.decode import load_decoder
from robuq_core.files import replacing
from robuq_core.kernels.ops import Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import LAYERS, PackedDiT
from robuq_core.models.quant_linear import QuantLinear, layer_bits, layer_rotation_block, quantizable_linears
from robuq_core.pipeline import Denoiser, Sampler
from robuq_core.quant.hadamard import Rotation, random_signs
from robuq_core.quant.packing import unpack_planar
from robuq_core.quant.ternary import ternary_fake_quantize
from train.config import TrainConfig
from train.data import BatchSource, open_dataset, prepare
from train.diagnose.report import html_report
from train.diagnose.watch import Diagnosis, LayerInput, LayerWatch
from train.evaluation.networks import EvaluationError
from train.evaluation.samples import Which, default_model, model_path, plain_sampler, random_classes
from train.messages import one_line
from train.progress import tracked
from train.run import Run
from train.sensitivity import fixed_set

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


_DRAWN = 8  # images that are drawn to see activations where there are no photos


def diagnose_run(
    config: TrainConfig, which: Which | None = None, checkpoint: Path | None = None
) -> tuple[Diagnosis, Path]:
    """Write what :func:`diagnosis_of` finds as ``MODEL.html`` and ``MODEL.json`` in ``run_dir/diagnosis``; returns it
    and the path of the first.

    Raises:
        EvaluationError: they cannot be written.
    """
    found = diagnosis_of(config, which, checkpoint)
    return found, write_diagnosis(config.run_dir / "diagnosis", found)


def diagnosis_of(config: TrainConfig, which: Which | None = None, checkpoint: Path | None = None) -> Diagnosis:
    """Run one model and look at what its layers are given.

    The inputs are the fixed set of ``sensitivity``: noised photos at all timesteps. Where ``data.path`` does not exist,
    they are the states that the model meets as it draws images of its own.

    Args:
        which: the model of the run; none is the last that it has made. ``checkpoint``: a packed file instead.

    Raises:
        StateError, CheckpointError, DataError: the model or the data cannot be read. EvaluationError: nothing to see.
    """
    chosen = which or default_model(config)
    name = chosen if checkpoint is None else checkpoint.stem
    if checkpoint is not None or chosen == "packed":
        return diagnose_packed(config, checkpoint or model_path(config, "packed"), name)
    model = Run(config).teacher() if chosen == "teacher" else Run(config).student()
    return diagnose_model(config, model, name)


def diagnose_model(config: TrainConfig, model: DiT, name: str) -> Diagnosis:
    """Of a plain or fake-quantised model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    quant = Run(config).quant if name == "student" else config.quant
    watch = LayerWatch(layer_inputs(model, quant), config.model.num_heads, config.seed)
    with torch.no_grad(), observed(model, watch, watch.attention):
        source = _run(config, model, device, lambda: plain_sampler(model, config, name))
    return watch.result(name, source)


def diagnose_packed(config: TrainConfig, path: Path, name: str) -> Diagnosis:
    """Of a packed file, run by the reference backend.

    Raises:
        EvaluationError: it is not of the configured model.
    """
    checkpoint = read_checkpoint(path)
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

    return watch.result(name, _run(config, model, backend.device, sampler))


def _run(config: TrainConfig, model: Denoiser, device: torch.device, sampler: Callable[[], Sampler]) -> str:
    """Let ``model`` see its inputs; says which."""
    return _run_on_photos(config, model, device) if config.data.path.exists() else _run_on_samples(config, sampler())


def _run_on_photos(config: TrainConfig, model: Denoiser, device: torch.device) -> str:
    settings = config.sensitivity
    dataset = open_dataset(config, prepare(config, note=lambda _: None))
    still = config.data.model_copy(update={"flip_probability": 0.0, "colour_jitter": 0.0})
    source = BatchSource(dataset, still, config.model.input_size, settings.batch_size, config.seed)
    watched = fixed_set(source, settings.samples, config.seed, torch.device("cpu"), config.diffusion.prediction_type)
    with tracked(watched, "watching layers") as batches:
        for batch in batches:
            model.forward(batch.x_t.to(device), batch.timesteps, batch.classes)
    return f"{settings.samples} noised training images, timesteps spread evenly over 0..999"


def _run_on_samples(config: TrainConfig, sampler: Sampler) -> str:
    defaults = sampler.defaults
    classes = random_classes(_DRAWN, sampler.valid_classes, config.seed)
    sampler.generate(classes, config.seed)
    return f"{len(classes)} images drawn by the model itself, at all {defaults.steps} steps of {defaults.sampler}"


def write_diagnosis(folder: Path, found: Diagnosis) -> Path:
    """``MODEL.json`` and ``MODEL.html`` in ``folder``; returns the latter.

    Raises:
        EvaluationError: they cannot be written.
    """
    report = folder / f"{found.model}.html"
    tree: dict[str, Any] = asdict(found)
    try:
        with replacing(report.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(tree) + "\n")
        with replacing(report) as temporary:
            temporary.write_text(html_report(found), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(
            f"{report}: cannot be written ({one_line(error)}); free some space and run again"
        ) from error
    return report
