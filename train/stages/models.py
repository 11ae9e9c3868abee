"""The models that the stages of a run hand on, read from its folder, and what reading them takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from robuq_core.classes import read_names
from robuq_core.config import QuantConfig
from robuq_core.errors import UserError
from robuq_core.files import read_json
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.config import ConfigError, TrainConfig
from train.state import StateError, load_ema
from train.trainer import meaning_of_weights


def teacher_path(config: TrainConfig) -> Path:
    return config.run_dir / "teacher.pt"


def warmup_path(config: TrainConfig) -> Path:
    return config.run_dir / "warmup.pt"


def sensitivity_path(config: TrainConfig) -> Path:
    return config.run_dir / "sensitivity.json"


def bits_path(config: TrainConfig) -> Path:
    return config.run_dir / "bits.json"


def qat_path(config: TrainConfig) -> Path:
    return config.run_dir / "qat.pt"


def packed_path(config: TrainConfig) -> Path:
    return config.run_dir / "model.safetensors"


def resolved_quant(config: TrainConfig) -> QuantConfig:
    """``quant`` with the activation width of every layer as the run has found it: ``bits.json``, if it searches.

    Raises:
        StateError: no usable ``bits.json``, or one of another budget or method than is configured.
    """
    if config.allocate.average_bits is None:
        return config.quant
    path = bits_path(config)
    try:
        table = read_json(path)
        quant = config.quant.model_validate({**config.quant.model_dump(), "bits": table["bits"]})
        made = {"average_bits": table["budget_bits"], "method": table["method"]}
    except FileNotFoundError as error:
        raise StateError(f"{path} does not exist: run the stage that writes it first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path}: not a bit table; delete it and run the allocate stage again") from error
    for key, found in made.items():
        if found != (wanted := getattr(config.allocate, key)):
            raise StateError(f"{path}: found for allocate.{key} {found}, but the configuration says {wanted}; run the "
                             "allocate stage again")  # fmt: skip
    return quant


def at_search_width(config: TrainConfig) -> TrainConfig:
    """``config`` with the uniform width that widths are searched around: the one nearest to the budget, if any.

    The warm-up trains at it, and sensitivities are measured with all other layers at it.
    """
    budget = config.allocate.average_bits
    if budget is None:
        return config
    quant = config.quant.model_copy(update={"activation_bits": math.floor(budget + 0.5)})
    return config.model_copy(update={"quant": quant})


def resolved(config: TrainConfig) -> TrainConfig:
    """``config`` with :func:`resolved_quant` in it, as training and its history need it."""
    return config.model_copy(update={"quant": resolved_quant(config)})


def load_teacher(config: TrainConfig, path: Path | None = None) -> DiT:
    """The full-precision model with the averaged weights of ``teacher.pt``, or of the kept state at ``path``."""
    model = DiT(config.model)
    load_ema(path or teacher_path(config), model, meaning_of_weights(config))
    return model


def quant_settings(quant: QuantConfig, *without: str) -> dict[str, Any]:
    """The settings that give the weights of a student their meaning, by dotted key."""
    tree = quant.model_dump(mode="json")
    return {f"quant.{key}": value for key, value in tree.items() if key not in without}


def load_student(config: TrainConfig, path: Path | None = None) -> tuple[DiT, dict[str, Any]]:
    """The fake-quantised model with the averaged weights of ``qat.pt``, or of the kept state at ``path``, and that
    state's step and history."""
    quant = resolved_quant(config)
    model = quantize_model(DiT(config.model), quant)
    return model, load_ema(path or qat_path(config), model, {**meaning_of_weights(config), **quant_settings(quant)})


def load_warmup(config: TrainConfig) -> DiT:
    """The fake-quantised model with the averaged weights of ``warmup.pt``, every layer at the uniform width."""
    quant = at_search_width(config).quant
    model = quantize_model(DiT(config.model), quant)
    load_ema(warmup_path(config), model, {**meaning_of_weights(config), **quant_settings(quant)})
    return model


def warm_start(config: TrainConfig, student: DiT, path: Path) -> None:
    """Give ``student`` the averaged weights of the quantised state at ``path``, whatever widths it was trained at.

    Raises:
        StateError: it is of another model, rotation or low-rank branch.
    """
    same = quant_settings(config.quant, "activation_bits", "adaln_bits", "bits")
    load_ema(path, student, {**meaning_of_weights(config), **same})


def read_class_names(config: TrainConfig) -> tuple[str, ...]:
    """The names in ``data.class_names``, one a class; empty if none are configured.

    Raises:
        ConfigError: the file cannot be read, or has not one name for each class.
    """
    path = config.data.class_names
    if path is None:
        return ()
    try:
        names = read_names(path)
    except UserError as error:
        raise ConfigError(f"data.class_names: {error}") from error
    if len(names) != config.model.num_classes:
        raise ConfigError(f"data.class_names: {path} has {len(names)} names but model.num_classes is "
                          f"{config.model.num_classes}")  # fmt: skip
    return names
