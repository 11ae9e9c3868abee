"""The stages of a run, each a function of the configuration: teacher, qat, export.

Files below ``run_dir``: ``teacher.pt``, ``qat.pt`` (resumable states) and their ``.log.jsonl``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robuq_core.checkpoint import Header, write_checkpoint
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.config import ConfigError, TrainConfig
from train.data import BatchSource, ImageDataset, centre_images, load_dataset
from train.state import exclusive, load_ema, load_state
from train.trainer import Trainer, meaning_of_weights

# A principal component below this share of the first is rounding noise.
_NEGLIGIBLE = 1e-9


def teacher_path(config: TrainConfig) -> Path:
    return config.run_dir / "teacher.pt"


def qat_path(config: TrainConfig) -> Path:
    return config.run_dir / "qat.pt"


def read_images(config: TrainConfig) -> ImageDataset:
    size = config.data.resize or config.model.input_size * config.data.supersample
    dataset = load_dataset(config.data.path, size, config.model.num_classes, config.data.split, config.data.fit)
    return replace(dataset, supersample=config.data.supersample)


def read_class_names(config: TrainConfig) -> tuple[str, ...]:
    """The names in ``data.class_names``, one a class; empty if none are configured.

    Raises:
        ConfigError: the file cannot be read, or has not one name for each class.
    """
    path = config.data.class_names
    if path is None:
        return ()
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_names: cannot read {path}: {error}") from error
    if len(names) != config.model.num_classes:
        raise ConfigError(f"data.class_names: {path} has {len(names)} names but model.num_classes is "
                          f"{config.model.num_classes}")  # fmt: skip
    return names


def train_teacher(config: TrainConfig) -> None:
    """Train the full-precision DiT, or go on from its saved state."""
    read_class_names(config)  # export needs them: better said now than after the training
    dataset = read_images(config)
    torch.manual_seed(config.seed)
    model = DiT(config.model)
    initialise_class_table(model, config, dataset)
    _run(config, "teacher", model, dataset)


def train_qat(config: TrainConfig) -> None:
    """Quantise the teacher's averaged weights and train them on, or go on from the saved state."""
    read_class_names(config)
    student = quantize_model(load_teacher(config), config.quant)
    teacher = load_teacher(config) if config.qat.distill_weight else None
    _run(config, "qat", student, read_images(config), teacher)


def load_teacher(config: TrainConfig) -> DiT:
    model = DiT(config.model)
    load_ema(teacher_path(config), model, meaning_of_weights(config))
    return model


def load_student(config: TrainConfig) -> tuple[DiT, dict[str, Any]]:
    """The fake-quantised model with the averaged weights of ``qat.pt``, and that state's step and history."""
    model = quantize_model(DiT(config.model), config.quant)
    quant = {f"quant.{key}": value for key, value in config.quant.model_dump(mode="json").items()}
    return model, load_ema(qat_path(config), model, {**meaning_of_weights(config), **quant})


def export(config: TrainConfig, path: Path) -> Header:
    """Pack the student into ``path``; the header says how it was made.

    Raises:
        StateError: no usable ``qat.pt`` or ``teacher.pt``. ConfigError: class names that do not fit the model.
    """
    model, student = load_student(config)
    teacher_state = load_state(teacher_path(config))
    provenance = {
        "teacher": {"step": teacher_state["step"], "history": teacher_state["history"]},
        "qat": student,
    }
    return write_checkpoint(
        path,
        model,
        quant=config.quant,
        diffusion=config.diffusion,
        sampler=config.sampler,
        class_names=read_class_names(config),
        provenance=provenance,
    )


def _run(config: TrainConfig, stage: str, model: DiT, dataset: ImageDataset, teacher: DiT | None = None) -> None:
    stage_config = config.teacher if stage == "teacher" else config.qat
    source = BatchSource(dataset, config.data, config.model.input_size, stage_config.batch_size, config.seed)
    path = config.run_dir / f"{stage}.pt"
    with exclusive(path):
        Trainer(config, stage_config, model, source, path, teacher).run()


@torch.no_grad()
def initialise_class_table(model: DiT, config: TrainConfig, dataset: ImageDataset) -> None:
    """Spread the class table as ``class_init`` asks: Gaussian, or principal components of the class means.

    ``pca`` gives classes with like images like codes, so that what is learnt of one serves the others. The
    components are weighted by the fourth root of their standard deviation: the leading ones still lead, and the
    fine ones stay above the noise of a 4-bit adaLN input. Overall spread: ``class_init_std``.
    """
    table = model.y_embedder.embedding_table.weight
    if config.class_init == "normal":
        torch.nn.init.normal_(table, std=config.class_init_std)
        return
    codes = _principal_codes(_class_means(dataset, config), table.shape[1])
    table.zero_()
    table[:-1, : codes.shape[1]] = codes / codes.std() * config.class_init_std


def _class_means(dataset: ImageDataset, config: TrainConfig) -> Tensor:
    images = centre_images(dataset, config.model.input_size).flatten(1).double()
    sums = images.new_zeros(config.model.num_classes, images.shape[1]).index_add_(0, dataset.labels, images)
    counts = torch.bincount(dataset.labels, minlength=config.model.num_classes)
    return sums / counts.clamp(min=1)[:, None]


def _principal_codes(means: Tensor, width: int) -> Tensor:
    centred = means - means.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = min(width, int((s > _NEGLIGIBLE * s[0]).sum()))
    # The SVD leaves each component's sign open; fix it, so that a run does not depend on the LAPACK build.
    u = u * u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    codes: Tensor = u[:, :kept] * s[:kept] ** 0.25
    return codes.float()
