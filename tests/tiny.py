"""A small packed model for tests: random weights, every layer alive."""

from __future__ import annotations

from pathlib import Path

import torch

from robuq_core.checkpoint import Description, write_checkpoint
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model

TINY = ModelConfig(
    input_size=16, patch_size=4, in_channels=3, hidden_size=48, depth=2, num_heads=4, num_classes=10, learn_sigma=True
)


def tiny_model(model: ModelConfig = TINY, quant: QuantConfig | None = None, seed: int = 0) -> DiT:
    """A fake-quantised DiT with no zero-initialised layer left."""
    torch.manual_seed(seed)
    dit = DiT(model)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return quantize_model(dit, quant or QuantConfig(rank=4)).eval()


def write_tiny(
    path: Path, model: ModelConfig = TINY, quant: QuantConfig | None = None, *, clip_sample: bool = False
) -> DiT:
    """Pack :func:`tiny_model` into ``path``; returns the model."""
    quant = quant or QuantConfig(rank=4)
    dit = tiny_model(model, quant)
    about = Description(
        quant,
        DiffusionConfig(prediction_type="sample", clip_sample=clip_sample),
        SamplerConfig(steps=4),
        class_names=tuple(f"class {i}" for i in range(model.num_classes)),
        provenance={"seed": 0},
    )
    write_checkpoint(path, dit, about)
    return dit
