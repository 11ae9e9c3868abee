"""The stages of a run, each a function of the configuration.

Files below ``run_dir``: ``data/`` (prepared samples), ``teacher.pt``, ``warmup.pt`` and ``qat.pt`` (resumable states)
with their ``.log.jsonl``, ``sensitivity.json``, ``bits.json``, ``model.safetensors``, ``evaluation.json``,
``config.yaml`` (as last used) and ``stages/`` (what each was made from).
"""

from robuq_core.models.dit import DiT
from train.config import TrainConfig
from train.data import read_images
from train.stages.class_table import initialise_class_table
from train.stages.models import (
    bits_path,
    load_student,
    load_teacher,
    load_warmup,
    packed_path,
    qat_path,
    read_class_names,
    resolved_quant,
    sensitivity_path,
    teacher_path,
    warmup_path,
)
from train.stages.run import export_to, run, run_prepare, run_stage
from train.stages.steps import STAGES, Stage, export

__all__ = [
    "STAGES",
    "DiT",
    "Stage",
    "bits_path",
    "export",
    "export_to",
    "initialise_class_table",
    "load_student",
    "load_teacher",
    "load_warmup",
    "packed_path",
    "qat_path",
    "read_class_names",
    "read_images",
    "resolved_quant",
    "run",
    "run_prepare",
    "run_stage",
    "sensitivity_path",
    "teacher_path",
    "train_qat",
    "train_teacher",
    "warmup_path",
]


def train_teacher(config: TrainConfig) -> None:
    """Train the full-precision DiT or take it from elsewhere; go on from its saved state."""
    run_stage("teacher", config)


def train_qat(config: TrainConfig) -> None:
    """Quantise the teacher's averaged weights and train them on, or go on from the saved state."""
    run_stage("qat", config)
