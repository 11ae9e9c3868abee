"""``robuq-train diagnose``: run one model of a run on fixed inputs and look at what its layers are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robuq_core.checkpoint import read_checkpoint
from robuq_core.decode import load_decoder
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Denoiser, Sampler
from train.config import TrainConfig
from train.data import BatchSource, open_dataset, prepare
from train.diagnose.capture import layer_inputs, observed, observed_packed
from train.diagnose.report import html_report
from train.diagnose.watch import Diagnosis, LayerWatch
from train.evaluation.networks import EvaluationError
from train.evaluation.samples import Which, default_model, model_path, plain_sampler, random_classes
from train.messages import one_line
from train.progress import tracked
from train.run import Run
from train.sensitivity import fixed_set

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
    classes = random_classes(_DRAWN, sampler.drawn_classes, config.seed)
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
