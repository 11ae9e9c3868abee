"""One way to draw from whatever a run has made: teacher, fake-quantised student or packed file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.decode import load_decoder
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train.config import TrainConfig
from train.evaluation.errors import EvaluationError
from train.evaluation.reference import sample_side
from train.parallel import training_device
from train.run import Run
from train.state import file_digest, read_state
from train.trainer import autocast

Which = Literal["teacher", "student", "packed"]
MODELS: tuple[Which, ...] = get_args(Which)


class _Autocast(nn.Module):
    """A network as training runs it on a GPU: compiled, and in bf16 where ``precision`` allows it."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self._forward = torch.compile(model, dynamic=True) if config.compile else model
        self._precision = config.precision

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        with autocast(self._precision, arguments[0].device):
            output: torch.Tensor = self._forward(*arguments)
        return output.float()


def plain_sampler(model: DiT, config: TrainConfig, name: str) -> Sampler:
    """A sampler that runs ``model`` itself (teacher or fake-quantised student), not a packed file; on a GPU if any."""
    device = training_device()
    decoder = None if config.data.vae is None else load_decoder(config.data.vae, device=device)
    header = Header(
        format_version=FORMAT_VERSION,
        model=config.model,
        quant=config.quant,
        diffusion=config.diffusion,
        sampler=config.sampler,
        decoder="pixels" if decoder is None else "latent",
        tensors={},
    )
    network: nn.Module = model.eval().to(device)
    if device.type == "cuda":
        network = _Autocast(network, config)
    return Sampler(
        network,
        header,
        checkpoint_name=name,
        backend_name="torch",
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        device=device,
        decoder=decoder,
    )


def known_model(name: str) -> Which:
    """``name`` as one of :data:`MODELS`.

    Raises:
        EvaluationError: it is none of them.
    """
    for which in MODELS:
        if which == name:
            return which
    raise EvaluationError(f"--model {name}: choose one of {', '.join(MODELS)}")


_STAGES: dict[Which, str] = {"teacher": "teacher", "student": "qat", "packed": "export"}


def default_model(config: TrainConfig) -> Which:
    """The last that the run has made."""
    return next((which for which in reversed(MODELS) if model_path(config, which).exists()), "teacher")


def model_path(config: TrainConfig, which: Which) -> Path:
    return Run(config).path(_STAGES[which])


def load_sampler(config: TrainConfig, which: Which, checkpoint: Path | None = None) -> tuple[Sampler, str]:
    """The sampler of ``which``, and what identifies its weights: the SHA-256 of a packed file, or a state's digest.

    ``checkpoint``: a packed file elsewhere, or the folder of a kept state of ``which``.

    Raises:
        StateError, CheckpointError: the file is missing or damaged. EvaluationError: it is of another shape.
    """
    run = Run(config)
    kept = checkpoint if checkpoint is not None and checkpoint.is_dir() else None
    if which == "packed" or (checkpoint is not None and kept is None):
        path = checkpoint or run.path("export")
        sampler, digest = Sampler.from_checkpoint(path, decoder=config.data.vae), file_digest(path)
    else:
        model, settings = (run.student(kept), run.resolved) if which == "student" else (run.teacher(kept), config)
        sampler = plain_sampler(model, settings, which)
        digest = run.digest(_STAGES[which]) if kept is None else read_state(kept).digest
    network, side = config.model, sample_side(config)
    if (sampler.image_size, sampler.num_classes) != (side, network.num_classes):
        raise EvaluationError(
            f"{sampler.checkpoint_name} draws {sampler.image_size} px and {sampler.num_classes} classes, but the "
            f"configuration has {side} px and {network.num_classes}: give the one it was trained with"
        )
    return sampler, digest
